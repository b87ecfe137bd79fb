// The CPL0 shim, part one: from either boot protocol to `mini_main` at CPL3.
//
//   PVH (start32)    32-bit protected mode, paging off, ebx = hvm_start_info
//   Linux (start64)  long mode, paging on, rsi = zero page (boot_params)
//
// On a host whose KVM interprets CPL0, each instruction here costs about a microsecond, and the rarer ones
// are missing: keep it short and plain. Page tables are laid out by the assembler, so nothing is computed.
//
// The first instructions of both entries print a newline: whoever measures the start of a virtual machine
// waits for that byte.

.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                  // name size, description size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad start32

.section .text.start, "ax"
.code32
.global start32
start32:
    mov dx, 0x3f8
    mov al, 10
    out dx, al
    cli
    cld
    mov esi, ebx
    xor edi, edi                // kind 0: PVH
    jmp enter_long_mode

// The boot processor (esi, edi live) and each application processor come here; it goes on at `common64` or
// `ap64` by the value of edi.
enter_long_mode:
    lgdt [gdt_pointer]
    mov eax, offset pml4
    mov cr3, eax
    mov eax, 0x620              // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080         // EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80000033         // PG NE ET MP PE
    mov cr0, eax
    .byte 0xea                  // far jump to the 64-bit code segment
    .long entered64
    .word 0x10

.code64
entered64:
    cmp edi, 2
    je ap64
    jmp common64

.global start64
start64:
    mov edx, 0x3f8
    mov al, 10
    out dx, al
    cli
    cld
    mov edi, 1                  // kind 1: Linux zero page in rsi
    mov rsp, offset shim_stack_top
    lgdt [gdt_pointer]
    mov eax, offset pml4
    mov cr3, rax
    mov eax, 0x620
    mov cr4, rax
    mov eax, 0x80000033
    mov cr0, rax
    push 0x10
    push offset common64
    retfq

common64:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, offset shim_stack_top
    // The task-state segment says which stack an interrupt from CPL3 uses, and by a bitmap of zeros that all
    // ports are open to CPL3 (IOPL 3 says so too, but an interpreting KVM looks only at the bitmap).
    mov eax, offset tss
    mov rdx, offset interrupt_stack_top
    mov [rax + 4], rdx
    mov word ptr [rax + 102], 104
    mov word ptr [gdt_tss + 2], ax
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 7], ah
    mov eax, 0x40
    ltr ax
    lidt [idt_pointer]
    mov eax, edi
    mov edi, eax
    push 0x2b                   // user data
    push offset user_stack_top - 8
    push 0x3002                 // IOPL 3, interrupts off
    push 0x33                   // user code
    push offset mini_main
    iretq

// Application processors start in real mode at a page below 1 MiB: this is copied there.
.code16
.global ap_trampoline
ap_trampoline:
    jmp 1f
    .byte 0, 0
    .word gdt_end - gdt - 1     // at 4: the descriptor table's limit and base
    .long gdt
1:  cli
    mov ax, cs
    mov ds, ax
    lgdtd [4]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea            // far jump to 32-bit code
    .long ap32
    .word 0x08
.global ap_trampoline_end
ap_trampoline_end:

.code32
ap32:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov edi, 2
    jmp enter_long_mode

.code64
ap64:
    mov eax, 0x18
    mov ds, eax
    mov ss, eax
    mov eax, 1
    lock xadd dword ptr [ap_taken], eax
    cmp eax, 63
    ja ap_park
    inc eax
    shl eax, 12
    lea rsp, [rax + ap_stacks]
    lidt [idt_pointer]
    // Switch the local APIC on, or no interrupt but INIT and SIPI arrives.
    mov eax, 0xfee000f0
    mov dword ptr [rax], 0x1ff
    lock inc qword ptr [ap_online]
ap_wait:
    sti
    hlt
    jmp ap_wait
ap_park:
    cli
    hlt
    jmp ap_park

.section .data.tables, "aw"
.balign 4096
.global pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad pd0 + 7
    .fill 511, 8, 0
pd0:                            // the first GiB, 2 MiB pages, open to CPL3
    .set page, 0
    .rept 512
    .quad page + 0x87
    .set page, page + 0x200000
    .endr

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    // 08 kernel code, 32 bit
    .quad 0x00af9b000000ffff    // 10 kernel code
    .quad 0x00cf93000000ffff    // 18 kernel data
    .quad 0x00cffb000000ffff    // 20 user code, 32 bit
    .quad 0x00cff3000000ffff    // 28 user data
    .quad 0x00affb000000ffff    // 30 user code
    .quad 0
gdt_tss:                        // 40 task state, base filled in
    .quad 0x0000890000002068
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

.global ap_online
ap_online: .quad 0
ap_taken: .long 0

.bss
.balign 4096
.global idt
idt: .skip 4096
tss: .skip 104 + 8192 + 8
.balign 4096
shim_stack: .skip 4096
shim_stack_top:
interrupt_stack: .skip 16384
interrupt_stack_top:
user_stack: .skip 262144
user_stack_top:
.global fault_stack_top
fault_stack: .skip 32768
fault_stack_top:
ap_stacks: .skip 262144
