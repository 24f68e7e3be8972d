"""Sixty files that execute code when something unpickles them, to test every reader of untrusted files.

Each would create a marker, a file or folder with its name, in a folder that the caller checks. They are assembled
opcode by opcode, so that nothing is ever executed in this process. Most act in ``pickle.loads``; those with the loader
"torch" or "numpy" need ``torch.load(weights_only=False)`` or ``numpy.load(allow_pickle=True)``.
"""

from __future__ import annotations

import io
import marshal
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Loader = Literal["pickle", "torch", "numpy"]

# Names of files in checkpoints of this package, Accelerate, Diffusers, Lightning and torch.distributed.
PLANTED_NAMES = (
    "manifest.json", "state.json", "config.json", "config.yaml", "monitor.json", "metrics.jsonl",
    "model.safetensors", "ema.safetensors", "optimizer.safetensors", "logvar.safetensors", "scaler.json",
    "random_states_0.pkl", "random_states_1.pkl", "model.bin", "pytorch_model.bin", "optimizer.bin", "scheduler.bin",
    "sampler.bin", "dl_state_dict.bin", "scaler.pt", "custom_checkpoint_0.pkl", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "unet_ema/diffusion_pytorch_model.safetensors",
    "last.ckpt", ".metadata", "__0_0.distcp", "training_args.bin",
)  # fmt: skip


@dataclass(frozen=True)
class HostileFile:
    """A file: the name, also of its marker, describes how it acts; the loader has to load it for that."""

    name: str
    data: bytes
    loader: Loader = "pickle"


# ---- an assembler of pickle opcodes

MARK, STOP, POP, REDUCE, BUILD, EMPTY_DICT, EMPTY_LIST = b"(", b".", b"0", b"R", b"b", b"}", b"]"


def pickle_of(version: int, *code: bytes) -> bytes:
    return b"\x80" + bytes([version]) + b"".join(code) + STOP


def string(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def bytes_of(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def list_of(*items: bytes) -> bytes:
    return EMPTY_LIST + MARK + b"".join(items) + b"e"


def dict_of(*items: bytes) -> bytes:
    return EMPTY_DICT + MARK + b"".join(items) + b"u"


def global_name(module: str, name: str) -> bytes:
    """GLOBAL, the opcode for names before protocol 4."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def stack_global(module: str, name: str) -> bytes:
    """STACK_GLOBAL, the opcode for names since protocol 4; the name may have dots."""
    return string(module) + string(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + REDUCE


def new(kind: bytes, *arguments: bytes) -> bytes:
    return kind + tuple_of(*arguments) + b"\x81"


def new_ex(kind: bytes, keywords: bytes, *arguments: bytes) -> bytes:
    return kind + tuple_of(*arguments) + keywords + b"\x92"


MKDIR = global_name("os", "mkdir")


def simple_pickle(path: Path) -> bytes:
    """The shortest hostile pickle, to be nested in others."""
    return pickle_of(2, call(MKDIR, string(str(path))))


# ---- one file per opcode that calls something


def by_opcode(folder: Path) -> list[HostileFile]:
    def code(name: str, make: Callable[[bytes], bytes], version: int = 4) -> HostileFile:
        return HostileFile(name, pickle_of(version, make(string(f"{folder}/{name}"))))

    def bare(name: str, before: bytes, after: bytes) -> HostileFile:
        """Protocol 0: printable, and without the protocol opcode at the start."""
        return HostileFile(name, before + b"S'" + f"{folder}/{name}".encode() + b"'\n" + after + STOP)

    holder = call(global_name("types", "SimpleNamespace"))
    setter = call(
        call(global_name("builtins", "type"), string("X"), tuple_of(), dict_of(string("__setitem__"), MKDIR))
    )
    tuple_, map_ = global_name("builtins", "tuple"), global_name("builtins", "map")

    def with_method(name: str) -> bytes:
        return holder + dict_of(string(name), MKDIR) + BUILD

    def register(name: str, number: int) -> bytes:
        return call(global_name("copyreg", "add_extension"), string("os"), string(name), integer(number)) + POP

    return [
        bare("reduce", MKDIR + MARK, b"tR"),
        bare("inst", MARK, b"ios\nmkdir\n"),
        code("obj", lambda m: MARK + MKDIR + m + b"o", 1),
        code("newobj", lambda m: new(tuple_, new(map_, MKDIR, list_of(m))), 2),
        code("newobj_ex", lambda m: new_ex(tuple_, EMPTY_DICT, new_ex(map_, EMPTY_DICT, MKDIR, list_of(m)))),
        code("build_setstate", lambda m: with_method("__setstate__") + m + BUILD),
        code("append", lambda m: with_method("append") + m + b"a"),
        code("appends", lambda m: with_method("append") + MARK + m + b"e"),
        code("additems", lambda m: with_method("add") + MARK + m + b"\x90"),
        code("setitem", lambda m: setter + m + integer(0o777) + b"s"),
        code("setitems", lambda m: setter + MARK + m + integer(0o777) + b"u"),
        code("stack_global", lambda m: call(stack_global("os", "mkdir"), m)),
        code("stack_global_dotted", lambda m: call(stack_global("shutil", "os.mkdir"), m)),
        code("ext1", lambda m: register("mkdir", 0xF0) + call(b"\x82\xf0", m)),
        code("ext2", lambda m: register("makedirs", 0xF0F0) + call(b"\x83\xf0\xf0", m)),
        code("ext4", lambda m: register("mknod", 0x7FF0F0F0) + call(b"\x84\xf0\xf0\xf0\x7f", m)),
        code("persid", lambda m: call(MKDIR, m) + b"Pstorage\n", 2),
        code("binpersid", lambda m: tuple_of(string("storage"), call(MKDIR, m)) + b"Q", 2),
        code("memo", lambda m: MKDIR + b"\x94" + POP + m + b"\x94" + POP + b"h\x00" + tuple_of(b"h\x01") + REDUCE),
        code("long_binput", lambda m: MKDIR + b"r" + struct.pack("<I", 3_000_000) + tuple_of(m) + REDUCE, 2),
        code("frame", lambda m: b"\x95" + struct.pack("<Q", len(call(MKDIR, m)) + 1) + call(MKDIR, m)),
        code("many_marks", lambda m: MARK * 100_000 + call(MKDIR, m)),
        code("endless_bytes", lambda m: call(MKDIR, m) + b"\x8e" + struct.pack("<Q", 1 << 60)),
        code("two_pickles", lambda m: call(MKDIR, m) + STOP + pickle_of(2, EMPTY_DICT)[:-1], 2),
    ]


# ---- one file per callable


def by_callable(folder: Path) -> list[HostileFile]:
    def code(name: str, make: Callable[[bytes], bytes], version: int = 4) -> HostileFile:
        return HostileFile(name, pickle_of(version, make(string(f"{folder}/{name}"))))

    def source(name: str, make: Callable[[str], bytes]) -> HostileFile:
        return HostileFile(name, pickle_of(4, make(f"open({str(folder / name)!r}, 'w').close()")))

    def nested(name: str, make: Callable[[bytes], bytes]) -> HostileFile:
        return HostileFile(name, pickle_of(4, make(simple_pickle(folder / name))))

    def compiled(line: str) -> bytes:
        return bytes_of(marshal.dumps(compile(line, "x", "exec")))

    path, partial, function = (
        global_name("pathlib", "PosixPath"),
        global_name("functools", "partial"),
        global_name("types", "FunctionType"),
    )
    os_module = call(global_name("importlib", "import_module"), string("os"))
    handler = global_name("logging", "FileHandler")
    default = global_name("collections", "defaultdict")
    torch_load = new_ex(partial, dict_of(string("weights_only"), b"\x89"), global_name("torch", "load"))
    return [
        code("open", lambda m: call(global_name("builtins", "open"), m, string("w"))),
        code("open_of_python_2", lambda m: call(global_name("__builtin__", "open"), m, string("w")), 2),
        HostileFile(
            "os_system", pickle_of(2, call(global_name("posix", "system"), string(f"mkdir '{folder}/os_system'")))
        ),
        code("os_open", lambda m: call(global_name("os", "open"), m, integer(os.O_CREAT))),
        code("os_symlink", lambda m: call(global_name("os", "symlink"), string("nowhere"), m)),
        code("subprocess_run", lambda m: call(global_name("subprocess", "run"), list_of(string("mkdir"), m))),
        code(
            "subprocess_output", lambda m: call(global_name("subprocess", "check_output"), list_of(string("mkdir"), m))
        ),
        source("eval", lambda line: call(global_name("builtins", "eval"), string(line))),
        source("exec", lambda line: call(global_name("builtins", "exec"), string(line))),
        source(
            "timeit",
            lambda s: call(
                global_name("timeit", "timeit"), string(s), string("0"), global_name("time", "time"), integer(1)
            ),
        ),
        source("cprofile", lambda line: call(global_name("cProfile", "run"), string(line))),
        source(
            "marshal", lambda s: call(call(function, call(global_name("marshal", "loads"), compiled(s)), EMPTY_DICT))
        ),
        code("path_touch", lambda m: call(stack_global("pathlib", "Path.touch"), call(path, m))),
        code(
            "methodcaller",
            lambda m: call(call(global_name("operator", "methodcaller"), string("touch")), call(path, m)),
        ),
        code(
            "attrgetter",
            lambda m: call(call(call(global_name("operator", "attrgetter"), string("mkdir")), os_module), m),
        ),
        code("getattr", lambda m: call(call(global_name("builtins", "getattr"), os_module, string("mkdir")), m)),
        code("partial", lambda m: call(call(partial, MKDIR, m))),
        code(
            "functools_reduce", lambda m: call(global_name("functools", "reduce"), MKDIR, list_of(m, integer(0o777)))
        ),
        code(
            "starmap",
            lambda m: call(
                global_name("collections", "deque"),
                call(global_name("itertools", "starmap"), MKDIR, list_of(tuple_of(m))),
            ),
        ),
        code(
            "defaultdict",
            lambda m: call(global_name("operator", "getitem"), call(default, call(partial, MKDIR, m)), string("")),
        ),
        code("reconstructor", lambda m: call(global_name("copyreg", "_reconstructor"), handler, handler, m)),
        code("zip_file", lambda m: call(global_name("zipfile", "ZipFile"), m, string("w"))),
        nested("pickle_in_pickle", lambda inner: call(global_name("pickle", "loads"), bytes_of(inner))),
        nested(
            "pickle_in_zlib",
            lambda inner: call(
                global_name("_pickle", "loads"),
                call(global_name("zlib", "decompress"), bytes_of(zlib.compress(inner))),
            ),
        ),
        code(
            "numpy_memmap",
            lambda m: call(
                global_name("numpy", "memmap"), m, string("uint8"), string("w+"), integer(0), tuple_of(integer(1))
            ),
        ),
        code("torch_save", lambda m: call(global_name("torch", "save"), EMPTY_DICT, m)),
        nested(
            "torch_storage",
            lambda inner: call(global_name("torch.storage", "_load_from_bytes"), bytes_of(torch_archive(inner))),
        ),
        nested(
            "torch_load",
            lambda inner: call(torch_load, call(global_name("io", "BytesIO"), bytes_of(torch_archive(inner)))),
        ),
    ]


# ---- one file per container format


def by_container(folder: Path) -> list[HostileFile]:
    def hidden(name: str, make: Callable[[bytes], bytes], loader: Loader = "pickle") -> HostileFile:
        return HostileFile(name, make(simple_pickle(folder / name)), loader)

    return [
        hidden("torch_zip", torch_archive, "torch"),
        hidden("torch_zip_of_lightning", lambda inner: torch_archive(lightning(inner)), "torch"),
        hidden("torch_legacy", torch_legacy, "torch"),
        hidden("numpy_array", numpy_array, "numpy"),
        hidden("numpy_archive", lambda inner: zipped({"arr_0.npy": numpy_array(inner)}), "numpy"),
        hidden("pickle_before_zip", lambda inner: inner + torch_archive(pickle_of(2, EMPTY_DICT))),
        hidden("pickle_in_safetensors", safetensors_that_unpickle),
        hidden("pickle_before_json", lambda inner: inner + b'\n{"format": 1}\n'),
    ]


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def torch_archive(data: bytes) -> bytes:
    """The format that ``torch.save`` writes since version 1.6, with this pickle inside."""
    return zipped({"archive/data.pkl": data, "archive/byteorder": b"little", "archive/version": b"3\n"})


def torch_legacy(data: bytes) -> bytes:
    """The earlier format of ``torch.save``: a magic number, a protocol, system information, then the object."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [0x1950A86A20F9469CFC6C, 1001, facts]
    return b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps([], 2)


def lightning(data: bytes) -> bytes:
    """A checkpoint in Lightning's format with a hostile callback."""
    inner = data[2:-1]  # without its protocol and its end
    return pickle_of(
        2, dict_of(string("state_dict"), EMPTY_DICT, string("global_step"), integer(7), string("callbacks"), inner)
    )


def numpy_array(data: bytes) -> bytes:
    """A ``.npy`` file with one object."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def safetensors_that_unpickle(data: bytes) -> bytes:
    """A valid safetensors file that ``pickle.loads`` executes.

    The length of the header, 18254, is read as the opcodes NONE and BINFLOAT, whose eight bytes reach into the
    header; a tensor's name there is a chain of short strings, each with its length, up to the start of the tensor.
    """
    length, link = 0x474E, 128
    tail = b'":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(data), len(data))
    rest = length - 2  # of the header, after {"
    links, last = divmod(rest, link)
    last += link  # one link less, so that the tail fits into the last two
    first = b"U" + bytes([last // 2 - 2]) + b"x" * (last // 2 - 2)
    final = last - len(first)
    chain = (b"U~" + b"x" * (link - 2)) * (links - 1) + first
    ending = b"U" + bytes([final - 2]) + tail.rjust(final - 2, b"x")
    header = b'{"' + chain + ending
    assert len(header) == length
    return struct.pack("<Q", length) + header + data


def corpus(folder: Path) -> list[HostileFile]:
    """All sixty files, each with a different name; ``folder`` is where the markers would appear."""
    return by_opcode(folder) + by_callable(folder) + by_container(folder)
