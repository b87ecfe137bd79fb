// The CPL0 shim, part two: the only ways back from CPL3.
//
//   device interrupts  count in `interrupt_counts`, end at the local APIC, return
//   faults             recorded; go on at `fault_fixup` if a case expects one, else at `mini_fault` in CPL3
//   the fault at       services, number in r8: what only CPL0 may do
//   `service_gate`
//
// Neither SYSCALL nor INT n is a way back: where CPL3 runs natively under an interpreting KVM the first leaves
// CS and SS alone and the second is refused. An undefined instruction works everywhere.

.section .text, "ax"
.code64
.balign 16
.global interrupt_stubs
interrupt_stubs:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21)
    .else
    push 0
    .endif
    push vector
    jmp interrupt_common
    .set vector, vector + 1
.endr

interrupt_common:
    // rax, vector, error, rip, cs, rflags, rsp, ss
    push rax
    mov rax, [rsp + 8]
    cmp eax, 32
    jb fault
    lock inc qword ptr [rax * 8 + interrupt_counts]
    cmp eax, 0xff               // spurious: not to be acknowledged
    je 2f
    cmp dword ptr [x2apic_on], 0
    jne 1f
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    jmp 2f
1:  push rcx
    push rdx
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
2:  pop rax
    add rsp, 16
    iretq

.global service_gate
service_gate:
    ud2
    ret

fault:
    cmp dword ptr [rsp + 24], offset service_gate
    je service
    mov [fault_vector], rax
    mov rax, [rsp + 16]
    mov [fault_error], rax
    mov rax, [rsp + 24]
    mov [fault_rip], rax
    mov rax, [rsp + 32]
    mov [fault_cs], rax
    mov rax, cr2
    mov [fault_address], rax
    mov rax, [fault_fixup]
    test rax, rax
    jz 1f
    mov qword ptr [fault_fixup], 0
    mov [rsp + 24], rax
    jmp 2f
1:  mov eax, offset mini_fault
    mov [rsp + 24], rax
    mov qword ptr [rsp + 32], 0x33
    mov qword ptr [rsp + 40], 0x3002
    mov eax, offset fault_stack_top - 8
    mov [rsp + 48], rax
    mov qword ptr [rsp + 56], 0x2b
2:  pop rax
    add rsp, 16
    iretq

service:
    add qword ptr [rsp + 24], 2     // go on behind the undefined instruction
    pop rax
    add rsp, 16
    cmp r8d, 1
    je 1f
    cmp r8d, 2
    je 2f
    cmp r8d, 3
    je 3f
    cmp r8d, 4
    je 4f
    cmp r8d, 5
    je 5f
    cmp r8d, 6
    je 6f
    cmp r8d, 7
    je 7f
    cmp r8d, 8
    je 8f
    // 0: sleep until an interrupt, unless the counter at rdi is no longer rsi
    cmp [rdi], rsi
    jne service_end
    sti
    hlt
    cli
service_end:
    iretq
service_fault:                  // where rdmsr and wrmsr go on when they fault
    mov r9d, 1
    iretq
1:  rdmsr                       // 1: read machine register ecx
    iretq
2:  wrmsr                       // 2: write it
    iretq
3:  lidt [no_idt]               // 3: forget the interrupt table, so that the next fault is the third
    iretq
4:  mov rax, cr3                // 4: drop cached translations
    mov cr3, rax
    iretq
5:  cli                         // 5: stop this processor for good
    hlt
    jmp 5b
6:  or qword ptr [rsp + 16], 0x200      // 6: let interrupts in from now on
    iretq
7:  and qword ptr [rsp + 16], -0x201    // 7: hold them back
    iretq
8:  cpuid                       // 8: identify (CPL0 sees what the machine's makers chose to show)
    iretq

.data
.balign 8
no_idt:
    .word 0
    .quad 0
.balign 8
.global x2apic_on
x2apic_on: .quad 0
.global fault_vector, fault_error, fault_rip, fault_cs, fault_address, fault_fixup
fault_vector: .quad 0
fault_error: .quad 0
fault_rip: .quad 0
fault_cs: .quad 0
fault_address: .quad 0
fault_fixup: .quad 0

.bss
.balign 64
.global interrupt_counts
interrupt_counts: .skip 2048
