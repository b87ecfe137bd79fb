"""Writes the reference of the gRPC interface from the comments in proto/, as Markdown.

Reads a descriptor set with source info (protoc --include_source_info). Owns: the layout. Never: meaning of its own; what is not in the
comments is not in the reference.
"""

import sys

from google.protobuf import descriptor_pb2 as pb

# Field numbers in FileDescriptorProto, DescriptorProto, EnumDescriptorProto and ServiceDescriptorProto (descriptor.proto).
MESSAGE, ENUM, SERVICE, FIELD, NESTED, NESTED_ENUM, VALUE, METHOD = 4, 5, 6, 2, 3, 4, 2, 2

SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in pb.FieldDescriptorProto.Type.items()
}


class File:
    """One file and its comments by path."""

    def __init__(self, proto: pb.FileDescriptorProto) -> None:
        self.proto = proto
        self.comments = {
            tuple(place.path): " ".join(place.leading_comments.split()) for place in proto.source_code_info.location
        }
        # The head of a file stands before its `syntax` (field 12).
        self.head = self.comments.get((12,), "")

    def comment(self, *path: int) -> str:
        return self.comments.get(path, "")


def anchor(full_name: str) -> str:
    return full_name.rsplit(".", 1)[-1].lower()


def link(type_name: str) -> str:
    name = type_name.lstrip(".")
    short = name.removeprefix("serio.v1.")
    return f"[{short}](#{anchor(name)})" if name.startswith("serio.v1.") else f"`{name}`"


def type_of(field: pb.FieldDescriptorProto) -> str:
    kind = link(field.type_name) if field.type_name else SCALARS[field.type]
    if field.label == pb.FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def service(file: File, index: int) -> list[str]:
    proto = file.proto.service[index]
    out = [f"### {proto.name}", "", file.comment(SERVICE, index), "", "| call | takes | answers | |", "|---|---|---|---|"]
    for number, rpc in enumerate(proto.method):
        takes = ("stream " if rpc.client_streaming else "") + link(rpc.input_type)
        answers = ("stream " if rpc.server_streaming else "") + link(rpc.output_type)
        out.append(f"| {rpc.name} | {takes} | {answers} | {cell(file.comment(SERVICE, index, METHOD, number))} |")
    return [*out, ""]


def message(file: File, proto: pb.DescriptorProto, path: tuple[int, ...]) -> list[str]:
    out = [f"#### {proto.name}", "", file.comment(*path), ""]
    if proto.field:
        out += ["| field | number | type | |", "|---|---|---|---|"]
    for index, field in enumerate(proto.field):
        out.append(f"| {field.name} | {field.number} | {type_of(field)} | {cell(file.comment(*path, FIELD, index))} |")
    out.append("")
    for index, nested in enumerate(proto.nested_type):
        if not nested.options.map_entry:
            out += message(file, nested, (*path, NESTED, index))
    for index, nested in enumerate(proto.enum_type):
        out += enum(file, nested, (*path, NESTED_ENUM, index))
    return out


def enum(file: File, proto: pb.EnumDescriptorProto, path: tuple[int, ...]) -> list[str]:
    out = [f"#### {proto.name}", "", file.comment(*path), "", "| value | number | |", "|---|---|---|"]
    for index, value in enumerate(proto.value):
        out.append(f"| {value.name} | {value.number} | {cell(file.comment(*path, VALUE, index))} |")
    return [*out, ""]


def reference(files: list[File]) -> list[str]:
    out = ["# serio.v1", "", "Made from the comments in proto/ by `scripts/api docs`.", ""]
    for file in files:
        out += [f"## {file.proto.name}", "", file.head, ""]
        for index in range(len(file.proto.service)):
            out += service(file, index)
        for index, proto in enumerate(file.proto.message_type):
            out += message(file, proto, (MESSAGE, index))
        for index, proto in enumerate(file.proto.enum_type):
            out += enum(file, proto, (ENUM, index))
    return out


def main() -> None:
    with open(sys.argv[1], "rb") as source:
        descriptors = pb.FileDescriptorSet.FromString(source.read())
    files = [File(proto) for proto in descriptors.file if proto.package == "serio.v1"]
    print("\n".join(reference(files)))


main()
