"""`harness/kvm_ioctl.py` says what Linux 7.3's headers say: every number, size and offset, and nothing is missing.

The headers are Debian's linux-libc-dev of trixie-backports, fetched (once) and unpacked beside the system's own. A C
program made of everything that the module declares prints what the compiler makes of the headers. In the other
direction every constant, structure and member that the two headers declare is looked for in the module.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import pickle
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness import kvm_ioctl as kvm
from harness.lab import debian

HEADERS_PACKAGE = "linux-libc-dev"
HEADERS_SUITE = "trixie-backports"
HEADERS_VERSION = (7, 3)

# What the headers declare and the module leaves out on purpose: names (shell patterns) and why.
LEFT_OUT = {
    "KVM_S390_*": "s390",
    "KVM_VM_S390_UCONTROL": "s390",
    "kvm_s390_keyop": "s390",
    "KVM_DEV_TYPE_FLIC": "s390",
    "KVM_PPC_*": "powerpc",
    "KVM_VM_PPC_*": "powerpc",
    "KVM_CREATE_SPAPR_TCE*": "powerpc",
    "KVM_ALLOCATE_RMA": "powerpc",
    "KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE": "powerpc",
    "kvm_vfio_spapr_tce": "powerpc",
    "KVM_DEV_TYPE_FSL_MPIC_*": "powerpc",
    "KVM_DEV_TYPE_XICS": "powerpc",
    "KVM_DEV_TYPE_XIVE": "powerpc",
    "KVM_MMU_FSL_BOOKE_*": "powerpc",
    "KVM_DIRTY_TLB": "powerpc",
    "kvm_dirty_tlb": "powerpc",
    "kvm_config_tlb": "powerpc",
    "KVM_ARM_*": "arm64",
    "KVM_VM_TYPE_ARM_*": "arm64",
    "kvm_arm_device_addr": "arm64",
    "KVM_DEV_TYPE_ARM_*": "arm64",
    "KVM_VM_MIPS_*": "mips",
    "KVM_DEV_TYPE_RISCV_AIA": "riscv",
    "KVM_DEV_TYPE_LOONGARCH_*": "loongarch",
    "KVM_REG_PPC": "powerpc",
    "KVM_REG_IA64": "ia64",
    "KVM_REG_ARM*": "arm64",
    "KVM_REG_S390": "s390",
    "KVM_REG_MIPS": "mips",
    "KVM_REG_RISCV": "riscv",
    "KVM_REG_LOONGARCH": "loongarch",
    "KVM_DEV_TYPE_MAX": "the kernel's own count of device types, which grows with every release",
    "HINT_UNSAFE_IN_KVM": "how the kernel itself compiles kvm_run",
}

# Calls of the function-like macros, in the syntax that C and Python share.
MACRO_CALLS = [
    *(f"KVM_REG_SIZE({number << 52:#x})" for number in range(9)),
    "KVM_X86_KVM_REG_SIZE(0)",
    "KVM_X86_KVM_REG_SIZE(1)",
    "KVM_X86_REG_TYPE_SIZE(2, 0x10)",
    "KVM_X86_REG_TYPE_SIZE(3, 0)",
    "KVM_X86_REG_TYPE_SIZE(4, 0)",
    "KVM_X86_REG_ID(2, 0xC0000080)",
    "KVM_X86_REG_MSR(0x4B564D00)",
    "KVM_X86_REG_KVM(0)",
    "KVM_X86_REG_KVM(7)",
    "KVM_PMU_ENCODE_MASKED_ENTRY(0xFC3, 0x12, 0x34, 1)",
    "KVM_PMU_ENCODE_MASKED_ENTRY(0x0C4, 0x1FF, 0x2FE, 0)",
]


# --- the headers ------------------------------------------------------------------------------------------------------


@dataclass
class Headers:
    """What linux/kvm.h and asm/kvm.h declare for x86."""

    include: list[str]  # options for the compiler
    version: tuple[int, int]
    macros: dict[str, str] = field(default_factory=dict)  # name -> body, of macros that have one
    enumerators: set[str] = field(default_factory=set)
    structures: dict[str, set[str]] = field(default_factory=dict)  # tag -> paths of its members

    def names(self) -> set[str]:
        return {*self.macros, *self.enumerators, *self.structures}

    def requests(self) -> set[str]:
        return {name for name, body in self.macros.items() if re.match(r"_IO[WR]*\(KVMIO\b", body)}


@pytest.fixture(scope="module")
def headers() -> Headers:
    problem = ""
    try:
        try:
            package = debian.fetch_package(HEADERS_PACKAGE, HEADERS_SUITE, version="7.3.*")
        except debian.PackageNotFoundError:  # the suite has moved on: a newer kernel's headers have it all too
            package = debian.fetch_package(HEADERS_PACKAGE, HEADERS_SUITE)
        root = debian.unpack(package) / "usr" / "include"
    except debian.FetchError as error:
        problem = str(error)
    if problem:
        pytest.fail(f"no Linux 7.3 headers to compare with: {problem}", pytrace=False)
    include = ["-nostdinc", f"-isystem{root / 'x86_64-linux-gnu'}", f"-isystem{root}"]
    version = re.search(r"LINUX_VERSION_CODE (\d+)", (root / "linux" / "version.h").read_text())
    assert version, "linux/version.h has no LINUX_VERSION_CODE"
    found = Headers(include, (int(version[1]) >> 16, int(version[1]) >> 8 & 0xFF))
    assert found.version >= HEADERS_VERSION, f"{package} is of Linux {found.version}"
    read_headers(found)
    return found


def read_headers(headers: Headers) -> None:
    """Fill in what the two headers declare, as the preprocessor sees it on x86."""
    text = run_gcc(["-E", "-dD", *headers.include, "-"], "#include <linux/kvm.h>\n")
    code = []
    ours = False
    for line in text.splitlines():
        if marker := re.match(r'# \d+ "(.*?)"', line):
            ours = marker[1].endswith(("/linux/kvm.h", "/asm/kvm.h"))
        elif ours and (macro := re.match(r"#define (\w+)(?:\([^)]*\))? (.*\S)", line)):
            headers.macros[macro[1]] = macro[2]
        elif ours and not line.startswith("#"):
            code.append(line)
    tokens = Tokens(re.findall(r"\w+|[^\s\w]", "\n".join(code)))
    while tokens.left():
        kind = tokens.take()
        tag = "" if tokens.peek() == "{" else tokens.take()
        assert kind in ("struct", "enum"), f"this test cannot read a declaration that begins with {kind} {tag}"
        assert tokens.take() == "{"
        if kind == "struct":
            headers.structures[tag] = set(tokens.members(""))
            tokens.skip_to(";")
        else:
            headers.enumerators |= set(tokens.enumerators())
            tokens.skip_to(";")


class Tokens:
    """Just enough of C's grammar for structures and enumerations."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def left(self) -> bool:
        return self._next < len(self._tokens)

    def peek(self) -> str:
        return self._tokens[self._next]

    def take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1]

    def skip_to(self, end: str) -> None:
        while self.take() != end:
            pass

    def enumerators(self) -> Iterator[str]:
        while self.peek() != "}":
            yield self.take()
            while self.peek() not in (",", "}"):
                self.take()
            if self.peek() == ",":
                self.take()
        self.take()

    def members(self, prefix: str) -> Iterator[str]:
        """Paths of all members up to the closing brace; those of unnamed structures and unions are the outer one's."""
        while self.peek() != "}":
            inner: list[str] | None = None
            if self.take() in ("struct", "union"):
                if self.peek() != "{":
                    self.take()  # the tag of a structure that is declared elsewhere
                if self.peek() == "{":
                    self.take()
                    inner = list(self.members(""))
            names = list(self.declarators())
            if inner is not None and not names:
                yield from (prefix + path for path in inner)
            for name, subscript in names:
                if not name.startswith("__empty_"):  # from __DECLARE_FLEX_ARRAY
                    yield prefix + name
                    yield from (f"{prefix}{name}{subscript}.{path}" for path in inner or ())
        self.take()

    def declarators(self) -> Iterator[tuple[str, str]]:
        """(name, "[0]" for each dimension) of each declarator up to the semicolon."""
        name = subscript = ""
        while (token := self.take()) != ";":
            if token == ",":
                yield name, subscript
                subscript = ""
            elif token == "[":
                subscript += "[0]"
                self.skip_to("]")
            elif token == ":":
                self.take()  # the width of a bit field
            elif re.match(r"[A-Za-z_]", token):
                name = token  # the last word counts; those before it are the type
        if name:
            yield name, subscript


def run_gcc(arguments: list[str], source: str) -> str:
    done = subprocess.run(["gcc", "-x", "c", *arguments], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"gcc {' '.join(arguments)}:\n{done.stderr[:4000]}"
    return done.stdout


# --- the module -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One member of a structure of the module."""

    path: str  # as in C: "io.port", "redirtbl[0].bits"
    ctype: Any
    offset: int
    is_bit_field: bool


def constants() -> dict[str, int]:
    return {name: value for name, value in vars(kvm).items() if type(value) is int and not name.startswith("_")}


def structures() -> dict[str, Any]:
    """The public structures and unions of the module, those included that have no name in C."""
    return {
        name: value
        for name, value in vars(kvm).items()
        if name.startswith("kvm_") and isinstance(value, type) and issubclass(value, (ctypes.Structure, ctypes.Union))
    }


def members(structure: Any, tags: set[str], prefix: str = "", base: int = 0) -> Iterator[Member]:
    """All members, and the members of members whose type has no name in C."""
    for name, ctype, *bits in structure._fields_:
        offset = base + (0 if bits else getattr(structure, name).offset)
        if name in getattr(structure, "_anonymous_", ()):
            yield from members(ctype, tags, prefix, offset)
            continue
        yield Member(prefix + name, ctype, offset, bool(bits))
        subscript = ""
        while issubclass(ctype, ctypes.Array):
            ctype, subscript = ctype._type_, subscript + "[0]"
        if issubclass(ctype, (ctypes.Structure, ctypes.Union)) and ctype.__name__ not in tags:
            yield from members(ctype, tags, f"{prefix}{name}{subscript}.", offset)


def is_open_array(ctype: Any) -> bool:
    return issubclass(ctype, ctypes.Array) and ctype._length_ == 0


def set_all_bits(structure: Any, path: str) -> None:
    *way, last = path.replace("[0]", ".0").split(".")
    for step in way:
        structure = structure[int(step)] if step.isdigit() else getattr(structure, step)
    setattr(structure, last, -1)


def module_facts(headers: Headers) -> dict[str, str]:
    """What the module says, keyed by a C expression or a remark."""
    facts = {f"constant {name}": f"{value:#x}" for name, value in constants().items() if name in headers.names()}
    for call in MACRO_CALLS:
        facts[f"constant {call}"] = f"{eval(call, vars(kvm)):#x}"
    for tag, structure in structures().items():
        if tag not in headers.structures:
            continue
        facts[f"sizeof {tag}"] = str(ctypes.sizeof(structure))
        for member in members(structure, set(headers.structures)):
            if member.path not in headers.structures[tag]:
                continue  # its own test says so
            where = f"{tag} {member.path}"
            if member.is_bit_field:
                value = structure()
                set_all_bits(value, member.path)
                facts[f"bits {where}"] = bytes(value).hex()
                continue
            facts[f"offsetof {where}"] = str(member.offset)
            if not is_open_array(member.ctype):
                facts[f"size {where}"] = str(ctypes.sizeof(member.ctype))
            if issubclass(member.ctype, ctypes._SimpleCData):
                facts[f"signed {where}"] = str(int(member.ctype(-1).value < 0))
    return facts


def header_program(facts: dict[str, str]) -> str:
    """A C program that prints the compiler's value of each of these facts."""
    lines = []
    for fact in facts:
        kind, _, rest = fact.partition(" ")
        tag, _, path = rest.partition(" ")
        place = f"((struct {tag} *)0)->{path}"
        if kind == "constant":
            lines.append(f'printf("{fact}\\t%#llx\\n", (unsigned long long)({rest}));')
        elif kind == "bits":
            lines.append(f"{{ struct {tag} s; __builtin_memset(&s, 0, sizeof s); s.{path} = -1;")
            lines.append(f'  printf("{fact}\\t"); for (unsigned i = 0; i < sizeof s; i++)')
            lines.append('    printf("%02x", ((unsigned char *)&s)[i]); printf("\\n"); }')
        else:
            expression = {
                "sizeof": f"sizeof(struct {tag})",
                "offsetof": f"__builtin_offsetof(struct {tag}, {path})",
                "size": f"sizeof({place})",
                "signed": f"((__typeof__({place}))-1 < (__typeof__({place}))0)",
            }[kind]
            lines.append(f'printf("{fact}\\t%llu\\n", (unsigned long long)({expression}));')
    body = "\n".join(lines)
    return f"#include <linux/kvm.h>\nint printf(const char *, ...);\nint main(void) {{\n{body}\nreturn 0; }}\n"


# --- the module and the headers ---------------------------------------------------------------------------------------


def test_every_number_size_and_offset_is_that_of_the_headers(headers: Headers, tmp_path: Path) -> None:
    facts = module_facts(headers)
    program = tmp_path / "abi"
    run_gcc(["-w", "-O0", "-DPAGE_SIZE=4096", *headers.include, "-o", str(program), "-"], header_program(facts))
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    said = dict(line.split("\t") for line in printed.splitlines())
    # KVM's constants print as 0x...; C prints a zero without the prefix
    theirs = {fact: "0x0" if fact.startswith("constant ") and value == "0" else value for fact, value in said.items()}
    wrong = [f"{fact}: module {facts[fact]}, headers {theirs[fact]}" for fact in facts if facts[fact] != theirs[fact]]
    assert not wrong, "\n".join(wrong)
    assert len(facts) > 2000, "this test has stopped looking at most of the module"


def test_no_constant_is_invented(headers: Headers) -> None:
    assert sorted(set(constants()) - headers.names()) == []


def test_every_structure_is_in_the_headers_or_part_of_one(headers: Headers) -> None:
    nested = {
        kind.__name__
        for tag in headers.structures
        if tag in structures()
        for member in members(structures()[tag], set(headers.structures))
        for kind in element_types(member.ctype)
    }
    assert sorted(set(structures()) - set(headers.structures) - nested) == []


def element_types(ctype: Any) -> Iterator[Any]:
    yield ctype
    while issubclass(ctype, ctypes.Array):
        ctype = ctype._type_
        yield ctype


def test_nothing_that_the_headers_declare_for_x86_is_missing(headers: Headers) -> None:
    declared = set(vars(kvm))
    missing = [
        name
        for name in sorted(headers.names() - declared)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)
    ]
    assert not missing, f"Linux {headers.version} declares, and kvm_ioctl.py does not: {', '.join(missing)}"


def test_every_structure_has_exactly_the_members_of_the_headers(headers: Headers) -> None:
    tags = set(headers.structures)
    wrong = []
    for tag in sorted(tags & set(structures())):
        ours = {member.path for member in members(structures()[tag], tags)}
        wrong += [f"{tag}.{path} is not in the module" for path in sorted(headers.structures[tag] - ours)]
        wrong += [f"{tag}.{path} is not in the headers" for path in sorted(ours - headers.structures[tag])]
    assert not wrong, "\n".join(wrong)


def test_what_is_left_out_is_there_to_leave_out(headers: Headers) -> None:
    useless = [pattern for pattern in LEFT_OUT if not fnmatch.filter(headers.names(), pattern)]
    declared = [pattern for pattern in LEFT_OUT if fnmatch.filter(set(constants()) | set(structures()), pattern)]
    assert (useless, declared) == ([], [])


def test_every_request_has_its_name(headers: Headers) -> None:
    requests = {name for name in headers.requests() if name in constants()}
    assert {constants()[name]: name for name in requests} == kvm.REQUEST_NAMES
    assert len(requests) == len(kvm.REQUEST_NAMES) > 100


def test_name_tables_have_every_value_once(headers: Headers) -> None:
    assert sorted(kvm.EXIT_NAMES) == list(range(len(kvm.EXIT_NAMES)))
    assert kvm.EXIT_NAMES[17] == "KVM_EXIT_INTERNAL_ERROR"
    capabilities = {name for name in headers.macros if name.startswith("KVM_CAP_")}
    assert set(kvm.CAP_NAMES.values()) == capabilities
    assert kvm.INTERNAL_ERROR_NAMES[1] == "KVM_INTERNAL_ERROR_EMULATION"
    assert sorted(kvm.MP_STATE_NAMES) == list(range(11))
    assert sorted(kvm.SYSTEM_EVENT_NAMES) == list(range(1, 8))


# --- structures of any length -----------------------------------------------------------------------------------------


def test_a_structure_of_any_length_has_its_room_and_says_so() -> None:
    table = kvm.cpuid2(3)
    assert isinstance(table, kvm.kvm_cpuid2)
    assert (table.nent, len(table.entries), ctypes.sizeof(table)) == (3, 3, 8 + 3 * 40)
    assert type(kvm.cpuid2(3)) is type(table)
    table.entries[2].function = 0x40000000
    assert bytes(table)[8 + 2 * 40 :][:4] == b"\0\0\0\x40"
    assert (kvm.msrs(2).nmsrs, ctypes.sizeof(kvm.msrs(2))) == (2, 8 + 2 * 16)
    assert (kvm.msr_list(5).nmsrs, ctypes.sizeof(kvm.msr_list(5))) == (5, 4 + 5 * 4)
    assert (kvm.cpuid(1).nent, kvm.reg_list(4).n, kvm.irq_routing(6).nr) == (1, 4, 6)
    assert (kvm.pmu_event_filter(7).nevents, kvm.signal_mask().len, ctypes.sizeof(kvm.signal_mask())) == (7, 8, 12)
    assert (ctypes.sizeof(kvm.xsave()), ctypes.sizeof(kvm.xsave(0)), ctypes.sizeof(kvm.xsave(11008))) == (
        4096,
        4096,
        11008,
    )


def test_nested_state_has_room_for_both_vendors() -> None:
    state = kvm.nested_state()
    assert state.size == ctypes.sizeof(state) == 128 + 2 * 4096
    state.data.svm[0].vmcb12[0] = 0x5A
    assert bytes(state)[128] == 0x5A
    assert state.data.vmx[0].vmcs12[0] == 0x5A


def test_only_structures_that_end_in_an_open_array_have_a_length() -> None:
    with pytest.raises(TypeError, match="kvm_regs does not end in an array of any length"):
        kvm.flexible(kvm.kvm_regs, 1)
    capabilities: Any = kvm.flexible(kvm.kvm_tdx_capabilities, 2)()
    assert ctypes.sizeof(capabilities) == ctypes.sizeof(kvm.kvm_tdx_capabilities) + 2 * 40
    capabilities.entries[0].function = 7
    assert capabilities.cpuid.nent == 0


# --- ioctl() ----------------------------------------------------------------------------------------------------------

FIONREAD = 0x541B


@pytest.fixture
def not_kvm() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


class Kernel:
    """Stands in for libc's ioctl: remembers the call, and answers with a result or an errno."""

    def __init__(self) -> None:
        self.errno = 0
        self.interruptions = 0  # calls that a signal ends, before one that is not
        self.address = 0
        self.seen = b""
        self.look = 0  # bytes to look at behind the address, while the call is on

    def __call__(self, fd: int, request: int, address: int) -> int:
        self.address = address
        if self.look:
            with open("/proc/self/mem", "rb", buffering=0) as memory:  # which survives a wrong address
                memory.seek(address)
                self.seen = memory.read(self.look)
        if self.interruptions:
            self.interruptions -= 1
            ctypes.set_errno(errno.EINTR)
            return -1
        ctypes.set_errno(self.errno)
        return -1 if self.errno else 42


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(kvm, "_ioctl", fake)
    return fake


def test_a_descriptor_that_is_not_kvm_is_named_as_that(not_kvm: int) -> None:
    with pytest.raises(kvm.KvmError) as caught:
        kvm.ioctl(not_kvm, kvm.KVM_GET_API_VERSION)
    error = caught.value
    assert (error.request, error.number, error.errno) == ("KVM_GET_API_VERSION", 0xAE00, errno.ENOTTY)
    assert str(error).startswith("KVM_GET_API_VERSION: ENOTTY (")
    assert "no KVM device" in error.meaning
    assert isinstance(error, OSError)


def test_a_closed_descriptor_is_named_as_that(not_kvm: int) -> None:
    fd = os.dup(not_kvm)
    os.close(fd)
    with pytest.raises(kvm.KvmError, match=r"KVM_GET_REGS: EBADF .*: the descriptor is closed"):
        kvm.ioctl(fd, kvm.KVM_GET_REGS, kvm.kvm_regs())


def test_an_unknown_request_is_shown_as_its_number(not_kvm: int) -> None:
    with pytest.raises(kvm.KvmError, match="ioctl 0xae7e: ENOTTY"):
        kvm.ioctl(not_kvm, 0xAE7E)


def test_an_error_means_something_of_its_own_for_some_requests() -> None:
    assert "KVM_GET_XSAVE2" in kvm.KvmError(kvm.KVM_GET_XSAVE, errno.EINVAL).meaning
    assert "wrong time" in kvm.KvmError(kvm.KVM_SET_REGS, errno.EINVAL).meaning
    assert "killed by the kernel" in str(kvm.KvmError(kvm.KVM_RUN, errno.EIO))
    assert str(kvm.KvmError(kvm.KVM_RUN, errno.EXDEV)) == f"KVM_RUN: EXDEV ({os.strerror(errno.EXDEV)})"


def test_every_meaning_belongs_to_a_request_that_exists() -> None:
    assert set(kvm._MEANINGS) <= set(kvm.REQUEST_NAMES.values())


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(kvm.KvmError(kvm.KVM_SET_SREGS, errno.EINVAL)))
    assert (error.request, error.errno, "EFER" in str(error)) == ("KVM_SET_SREGS", errno.EINVAL, True)


@pytest.mark.parametrize("argument", [b"\0" * 2000, memoryview(b"\0" * 2000), "0" * 2000, None, 1.5])
def test_what_the_kernel_cannot_write_to_is_refused(not_kvm: int, argument: Any) -> None:
    with pytest.raises(TypeError, match=rf"KVM_SET_CPUID2: .*not {type(argument).__name__}"):
        kvm.ioctl(not_kvm, kvm.KVM_SET_CPUID2, argument)


@pytest.mark.parametrize("argument", [bytearray(100), kvm.kvm_segment()])
def test_what_is_too_short_for_the_kernel_is_refused(not_kvm: int, argument: Any) -> None:
    with pytest.raises(ValueError, match=r"KVM_GET_REGS: the argument has .* bytes, the kernel takes 144"):
        kvm.ioctl(not_kvm, kvm.KVM_GET_REGS, argument)


def test_the_kernel_writes_to_the_callers_memory() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"seven b")
        number, buffer = ctypes.c_int(), bytearray(4)
        assert kvm.ioctl(reader, FIONREAD, number) == 0
        kvm.ioctl(reader, FIONREAD, buffer)
        assert (number.value, int.from_bytes(buffer, "little")) == (7, 7)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("size", [1024, 1025, 100_000])
def test_a_buffer_is_not_copied_whatever_its_size(kernel: Kernel, size: int) -> None:
    buffer = bytearray(size)
    kvm.ioctl(3, kvm.KVM_SET_CPUID2, buffer)
    assert kernel.address == ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("number", [0, 0x7FFFFFFF, 0x80000000, 0xFFFBD000, 0xFFFF800000000000, True])
def test_numbers_of_any_size_arrive_as_they_are(kernel: Kernel, number: int) -> None:
    assert kvm.ioctl(3, kvm.KVM_SET_TSS_ADDR, number) == 42
    assert kernel.address == number


@pytest.mark.parametrize("request_number", [kvm.KVM_SET_IDENTITY_MAP_ADDR, kvm.KVM_X86_SETUP_MCE])
def test_a_number_that_goes_by_address_is_put_into_memory(kernel: Kernel, request_number: int) -> None:
    kernel.look = 8
    kvm.ioctl(3, request_number, 0xFFFBC000)
    assert int.from_bytes(kernel.seen, "little") == 0xFFFBC000


def test_an_interrupted_run_is_a_plain_exception(kernel: Kernel) -> None:
    kernel.errno = errno.EINTR
    with pytest.raises(InterruptedError) as interrupted:
        kvm.ioctl(3, kvm.KVM_RUN)
    assert not isinstance(interrupted.value, kvm.KvmError)
    kernel.errno = errno.EAGAIN
    with pytest.raises(BlockingIOError):
        kvm.ioctl(3, kvm.KVM_RUN)
    with pytest.raises(kvm.KvmError, match="KVM_SET_REGS: EAGAIN"):
        kvm.ioctl(3, kvm.KVM_SET_REGS, kvm.kvm_regs())


def test_any_other_request_that_a_signal_ends_is_called_again(kernel: Kernel) -> None:
    kernel.interruptions = 3
    assert kvm.ioctl(3, kvm.KVM_CREATE_VM, 0) == 42
    assert not kernel.interruptions
    kernel.interruptions, kernel.errno = 1, errno.ENOMEM
    with pytest.raises(kvm.KvmError, match="KVM_CREATE_VM: ENOMEM"):
        kvm.ioctl(3, kvm.KVM_CREATE_VM, 0)
