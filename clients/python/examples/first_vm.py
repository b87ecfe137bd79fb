#!/usr/bin/env python3
"""Makes a vdc and a VM, watches what happens to them, reads the node's capacity, and cleans up.

    first_vm.py [--target /run/serio/seriod.sock] [--image tiny] [--memory 256]
    first_vm.py --target HOST:PORT --ca ca.pem --cert client.pem --key client.key
"""

import argparse
import sys

import grpc
import serio
from serio.v1 import node_pb2, node_pb2_grpc, vdc_pb2, vdc_pb2_grpc, vm_pb2, vm_pb2_grpc


def run(channel: grpc.Channel, image: str, memory_mib: int) -> None:
    vdcs = vdc_pb2_grpc.VdcServiceStub(channel)
    vms = vm_pb2_grpc.VmServiceStub(channel)
    node = node_pb2_grpc.NodeServiceStub(channel)

    quota = vdc_pb2.Quota(vcpus=2, memory_bytes=1 << 30, storage_bytes=4 << 30)
    vdc = vdcs.CreateVdc(vdc_pb2.CreateVdcRequest(request_id=serio.request_id(), vdc_id="first", quota=quota))
    print("made", vdc.name)

    # Asked for twice with one id: made once.
    spec = vm_pb2.VmSpec(vcpus=1, memory_bytes=memory_mib << 20, image=f"images/{image}")
    create = vm_pb2.CreateVmRequest(request_id=serio.request_id(), parent=vdc.name, vm_id="vm", spec=spec, start=True)
    vm = vms.CreateVm(create)
    assert vms.CreateVm(create).uid == vm.uid
    print("made", vm.name, vm_pb2.VmState.Name(vm.status.state))

    allocated = sum(numa.memory.allocated for numa in node.GetCapacity(node_pb2.GetCapacityRequest()).inventory.numa_nodes)
    print(f"the node has promised {allocated >> 20} MiB")

    # More than the quota allows: the refusal says what, where and what to do.
    try:
        spec.memory_bytes = 64 << 30
        vms.CreateVm(vm_pb2.CreateVmRequest(request_id=serio.request_id(), parent=vdc.name, vm_id="big", spec=spec))
    except grpc.RpcError as refused:
        print("refused as it should be:", serio.explain(refused))

    watch = node_pb2.WatchEventsRequest(follow=True, resource_prefix=vm.name)
    for event in node.WatchEvents(watch):
        print(f"event {event.number}: {event.resource} {event.kind}: {event.message}")
        if event.kind == "started":
            vms.DeleteVm(vm_pb2.DeleteVmRequest(request_id=serio.request_id(), name=vm.name, force=True))
        if event.kind == "deleted":
            break
    vdcs.DeleteVdc(vdc_pb2.DeleteVdcRequest(request_id=serio.request_id(), name=vdc.name))
    print("deleted", vdc.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=serio.SOCKET, help="a Unix socket's path, or HOST:PORT")
    parser.add_argument("--image", default="tiny")
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    for name in ("ca", "cert", "key"):
        parser.add_argument(f"--{name}", help="a PEM file, for HOST:PORT")
    options = parser.parse_args()
    try:
        with serio.connect(options.target, ca=options.ca, cert=options.cert, key=options.key) as channel:
            run(channel, options.image, options.memory)
    except grpc.RpcError as error:
        print(f"first_vm: {serio.explain(error)}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"first_vm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
