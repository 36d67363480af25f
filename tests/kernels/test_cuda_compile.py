# SPDX-License-Identifier: MIT
"""Compilation of the CUDA sources by nvcc: for every architecture, without a GPU and torch's headers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.setup_script import load_setup
from support.step_forms import LIST, StepForm, listed

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))

#: The registers of a multiprocessor, on every architecture that is compiled for, and the threads of a block.
REGISTER_FILE = 65536
THREADS = 256


setup_py = load_setup()
RELEASE, HOME, PROBLEM = setup_py.find_toolkit(os.environ)

#: Its kernels are those of step_bf16.cu with other conversions, which step.cu has for every architecture: the first is
#: left out.
HALF = "step_f16.cu"

needs_nvcc = pytest.mark.skipif(HOME is None, reason=f"needs the CUDA toolkit: {PROBLEM}")


@dataclass
class Function:
    """A kernel of one architecture: the report of ptxas, and the count of each instruction."""

    registers: int = 0
    spilled: int = 0  # bytes
    stack: int = 0  # bytes
    instructions: Counter[str] | None = None
    order: tuple[str, ...] = ()  # without padding
    backward: int = 0  # branches to an earlier instruction


@dataclass
class Compiled:
    source: str
    messages: list[str]  # what is not ptxas' report
    functions: dict[tuple[str, str], Function]  # by architecture ("sm_90") and short name, see _short
    ptx: dict[str, str]  # by short name


_DTYPES = {"f": "float", "d": "double"}


def _short(mangled: str) -> str:
    """Return ``step_kernel<float, 4>`` for a mangled name: the storage dtype and the elements per thread.

    ``, more`` follows where the step's kernel may draw noise and write the next model input. The kernel of a form is
    ``form_kernel<float, 15>``, by the form's key.
    """
    if form := re.search(r"form_kernelI(\w+?)fLi\d+ELi(\d+)EEE", mangled):
        return f"form_kernel<{_DTYPES.get(form[1], form[1].lstrip('0123456789_'))}, {form[2]}>"
    if whole := re.search(
        r"\d+((?:finish_)?(?:gram|log_prob|diffusion_loss|diffusion_loss_gradient)_kernel)I(\w+?)EEv", mangled
    ):
        return f"{whole[1]}<{whole[2]}>"
    found = re.search(r"([a-z_]+_kernel)I(\w+?)[fd]?Li(\d+)E(Lb1E)?", mangled)
    assert found is not None, mangled
    name, stored, width, more = found.groups()
    if name == "randn_kernel":  # it has no type of computation after the stored one
        stored = re.search(r"_kernelI(\w+?)Li", mangled)[1]  # type: ignore[index]
    stored = _DTYPES.get(stored, stored.lstrip("0123456789_"))
    return f"{name}<{stored}, {width}{', more' if more else ''}>"


def _cuobjdump() -> str | None:
    """Return the path of cuobjdump, the toolkit's or that of the triton package."""
    for folder in (HOME and f"{HOME}/bin", os.environ.get("PATH")):
        found = shutil.which("cuobjdump", path=folder)
        if found:
            return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))


def _architectures(source: str) -> list[str]:
    """Return what a source is compiled for, in the words of TORCH_CUDA_ARCH_LIST."""
    every: list[str] = setup_py.cuda_architectures(RELEASE).split(";")
    return every[1:] if source == HALF else every


def _run(*command: object) -> tuple[str, str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.name)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compile one source like setup.py, in one call of nvcc."""
    if HOME is None:
        pytest.skip(f"needs the CUDA toolkit: {PROBLEM}")
    out = tmp_path_factory.mktemp("cuda") / "object.o"
    architectures = []
    for version in _architectures(request.param.name):
        number = version.removesuffix("+PTX").replace(".", "")
        kinds = f"[sm_{number},compute_{number}]" if version.endswith("+PTX") else f"sm_{number}"
        architectures += ["-gencode", f"arch=compute_{number},code={kinds}"]
    flags = [*setup_py.NVCC_FLAGS, "-std=c++17", "-I", CSRC, "-Xptxas", "-v", "--threads", "2"]
    printed, reported = _run(f"{HOME}/bin/nvcc", *flags, *architectures, "-c", request.param, "-o", out)

    functions: dict[tuple[str, str], Function] = {}
    messages, function = [], Function()
    for line in [*printed.splitlines(), *reported.splitlines()]:
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            function = functions.setdefault((entry[2], _short(entry[1])), Function())
        elif sizes := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            function.stack, function.spilled = int(sizes[1]), int(sizes[2]) + int(sizes[3])
        elif used := re.search(r"Used (\d+) registers", line):
            function.registers = int(used[1])
        elif line.strip() and not line.startswith("ptxas info"):
            messages.append(line)

    ptx = {}
    tool = _cuobjdump()
    if tool is not None:
        listing, _ = _run(tool, "-sass", "-arch", "sm_90", out)
        for part in listing.split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*)", code, re.MULTILINE)
            # The end is padded by a branch to itself and by no operations.
            while lines[-1][1] in ("NOP", "BRA"):
                lines.pop()
            function = functions["sm_90", _short(name)]
            function.order = tuple(opcode for _, opcode, _ in lines)
            function.instructions = Counter(function.order)
            jumps = [(at, re.search(r"0x([0-9a-f]+)", to)) for at, opcode, to in lines if opcode.startswith("BRA")]
            function.backward = sum(to is not None and int(to[1], 16) <= int(at, 16) for at, to in jumps)
        listing, _ = _run(tool, "-ptx", out)
        for name, code in re.findall(r"\.entry (\w+)\((.*?)^}", listing, re.DOTALL | re.MULTILINE):
            ptx[_short(name)] = code
    return Compiled(request.param.name, messages, functions, ptx)


def _machine_code(compiled: Compiled) -> dict[str, Counter[str]]:
    """Return the count of each instruction in each kernel of sm_90."""
    found = {name: f.instructions for (arch, name), f in compiled.functions.items() if arch == "sm_90"}
    if None in found.values():
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of the triton package")
    return found  # type: ignore[return-value]


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(n for opcode, n in instructions.items() if re.match(pattern, opcode))


#: Elements in 16 bytes, and the file of the step's kernels for each dtype.
WIDTHS = {"half": 8, "nv_bfloat16": 8, "float": 4, "double": 2}
FILES = {"half": HALF, "nv_bfloat16": "step_bf16.cu", "float": "step_f32.cu", "double": "step_f64.cu"}
#: General kernels: 16 bytes a thread and one element a thread; each without and with noise and a model input.
PACKED = {stored: f"step_kernel<{stored}, {width}>" for stored, width in WIDTHS.items()}
MORE = {stored: f"step_kernel<{stored}, {width}, more>" for stored, width in WIDTHS.items()}
GENERAL = {
    stored: [PACKED[stored], MORE[stored], *(f"step_kernel<{stored}, 1{more}>" for more in ("", ", more"))]
    for stored in WIDTHS
}
#: Kernels of forms; float64 has none.
FORMS = list(listed(LIST.read_text(encoding="utf-8")))


def form_kernel(stored: str, form: StepForm) -> str:
    return f"form_kernel<{stored}, {form.key}>"


def most_registers(form: StepForm) -> int:
    """Return the registers of a thread with as many resident threads as csrc/cuda/step_form.h asks for."""
    many = form.histories + (form.noise != "kNone") + (form.row == "kByIndex")
    return 64 if many < 3 else 80 if many < 5 else 128


#: Of randn.cu: whole chunks of four a thread.
RANDN = [f"randn_kernel<{stored}, {max(width, 4)}>" for stored, width in WIDTHS.items()]
#: For tensors of dtypes of their own, by the compute dtype; ``, more``: with a mask.
MIXED = [
    f"mixed_kernel<{compute}, {width}{masked}>"
    for compute, width in (("float", 8), ("float", 1), ("double", 2), ("double", 1))
    for masked in ("", ", more")
]
#: Six float64 tensors and their sums keep 27 numbers of two registers in each thread; its blocks have 256.
ONE_BLOCK = "gram_kernel<ddLi6ELb1E>"
KERNELS = {"step.cu": MIXED, "randn.cu": RANDN} | {
    name: [*GENERAL[stored], *(form_kernel(stored, form) for form in FORMS if stored != "double")]
    for stored, name in FILES.items()
}
STORED = {name: stored for stored, name in FILES.items()}


def _forms(compiled: Compiled) -> dict[StepForm, str]:
    """Return the names of a file's kernels of forms."""
    if STORED.get(compiled.source, "double") == "double":
        pytest.skip(f"{compiled.source} holds no kernels of forms")
    return {form: form_kernel(STORED[compiled.source], form) for form in FORMS}


@needs_nvcc
def test_cuda_sources_compile_for_every_architecture_without_a_warning(compiled: Compiled) -> None:
    assert compiled.messages == []
    wanted = {"sm_" + v.removesuffix("+PTX").replace(".", "") for v in _architectures(compiled.source)}
    assert compiled.source == HALF or {"sm_80", "sm_90"} <= wanted
    assert {arch for arch, _ in compiled.functions} == wanted
    if compiled.source in KERNELS:
        assert compiled.functions.keys() == {(arch, name) for arch in wanted for name in KERNELS[compiled.source]}


@needs_nvcc
def test_cuda_kernels_use_registers_without_spills(compiled: Compiled) -> None:
    assert all(function.registers > 0 for function in compiled.functions.values())
    spilled = {key: f for key, f in compiled.functions.items() if f.spilled or f.stack}
    assert spilled == {}


@needs_nvcc
def test_cuda_kernels_fit_two_blocks_per_multiprocessor(compiled: Compiled) -> None:
    # With one, nothing would hide the latency of its loads.
    most = REGISTER_FILE // THREADS // 2
    found = {key: f.registers for key, f in compiled.functions.items() if f.registers > most}
    assert {key for key in found if key[1] != ONE_BLOCK} == set()
    assert all(registers <= REGISTER_FILE // THREADS for registers in found.values())


@needs_nvcc
def test_packed_step_on_cuda_moves_16_bytes_per_access(compiled: Compiled) -> None:
    if compiled.source not in STORED:
        pytest.skip(f"{compiled.source} holds another kernel")
    code, stored = _machine_code(compiled), STORED[compiled.source]
    # The sample, the model's three tensors, the noise and four registers, and once more the sample where it stays as it
    # is; what is narrower are tails and scalars.
    for name in (PACKED[stored], MORE[stored]):
        assert _count(code[name], r"LDG\b.*\.128") == 10, name
    # Three outputs, and the sample that stays. In pieces, each store of a warp would touch all the lines that the whole
    # one does.
    assert _count(code[PACKED[stored]], r"STG\b.*\.128") == 4
    # And the model input, after a step and of a sample that stays: a whole pack of the samples' own dtype, several of a
    # wider one, one of the other half type.
    inputs = sum(WIDTHS[stored] * size // 16 for size in (2, 2, 4, 8) if WIDTHS[stored] * size >= 16)
    # The compiler may write code out twice, for the two copies; that none is in pieces PACKED shows.
    assert _count(code[MORE[stored]], r"STG\b.*\.128") >= 4 + 2 * inputs


@needs_nvcc
def test_kernels_of_forms_fit_their_registers(compiled: Compiled) -> None:
    names = {name: most_registers(form) for form, name in _forms(compiled).items()}
    used = {key: f.registers for key, f in compiled.functions.items() if key[1] in names}
    assert len(used) == len(names) * len({arch for arch, _ in compiled.functions})
    assert {key: registers for key, registers in used.items() if registers > names[key[1]]} == {}


@needs_nvcc
def test_kernels_of_forms_load_their_tensors_and_row_alone(compiled: Compiled) -> None:
    code = _machine_code(compiled)
    for form, name in _forms(compiled).items():
        # Of the row the prediction and of each output the first half of its map.
        tensors = 2 + form.guided + (form.noise == "kGiven") + form.histories
        assert _count(code[name], r"LDG\b.*\.128") == tensors + 1 + form.outputs, form
        # An output each, and the model input once or twice.
        assert _count(code[name], r"STG\b") == _count(code[name], r"STG\b.*\.128") == form.outputs + 2, form
        assert _count(code[name], r"LDG\b.*\.U?(8|16)\b") == 0, form


@needs_nvcc
def test_kernels_of_forms_load_before_they_branch(compiled: Compiled) -> None:
    # A load behind a branch on the row would begin when the row has come.
    _machine_code(compiled)
    for form, name in _forms(compiled).items():
        order = compiled.functions["sm_90", name].order
        last = max(i for i, opcode in enumerate(order) if opcode.startswith("LDG"))
        assert last < order.index("BRA"), form


#: The most instructions an element of steps in bfloat16 that takes every branch: terms, a finite clip, drawn noise,
#: but no model input. docs/performance.md has the counts.
MOST_INSTRUCTIONS = {
    StepForm("kByValue", "kNone", False, 0, 1): 20,  # DDIM, flow Euler
    StepForm("kByValue", "kNone", True, 0, 1): 25,  # with guidance
    StepForm("kByValue", "kGiven", True, 0, 1): 28,
    StepForm("kByValue", "kDrawn", True, 0, 1): 71,
    StepForm("kByIndex", "kNone", True, 0, 1): 28,
}
#: In all outputs' branches, model input included: forms with more than one output.
MOST_IN_ALL = {StepForm("kByValue", "kNone", True, 1, 2): 42}  # DPM-Solver++ 2M with guidance


@needs_nvcc
def test_common_forms_take_few_instructions(compiled: Compiled) -> None:
    if compiled.source != FILES["nv_bfloat16"]:
        pytest.skip(f"{compiled.source} holds another dtype")
    _machine_code(compiled)
    found = {}
    for form in (*MOST_INSTRUCTIONS, *MOST_IN_ALL):
        function = compiled.functions["sm_90", form_kernel("nv_bfloat16", form)]
        # No instruction runs twice: there is neither a loop nor a call.
        assert function.backward == 0
        assert not any(opcode.startswith("CALL") for opcode in function.order)
        count = len(function.order)
        if form in MOST_INSTRUCTIONS:
            store = next(i for i, opcode in enumerate(function.order) if opcode.startswith("STG"))
            # After the output, a thread without a model input ends.
            count = function.order.index("EXIT", store) + 1
        found[form] = count / WIDTHS["nv_bfloat16"]
    print({str(form): round(count, 1) for form, count in found.items()})
    most = MOST_INSTRUCTIONS | MOST_IN_ALL
    assert {form: count for form, count in found.items() if count > most[form]} == {}


@needs_nvcc
def test_mixed_step_on_cuda_loads_wide_before_first_conversion(compiled: Compiled) -> None:
    if compiled.source != "step.cu":
        pytest.skip(f"{compiled.source} holds another kernel")
    code = _machine_code(compiled)["mixed_kernel<float, 8>"]
    # As of the other kernels, ten tensors: of a float one the second half is an access of its own.
    assert _count(code, r"LDG\b.*\.128") == 2 * 10
    assert _count(code, r"LDG\b.*\.U?(8|16)\b") == 0
    assert _count(code, r"STG\b") == _count(code, r"STG\b.*\.128") > 0
    order = compiled.functions["sm_90", "mixed_kernel<float, 8>"].order
    wide = [i for i, opcode in enumerate(order) if re.match(r"LDG\b.*\.128", opcode)]
    widened = [i for i, opcode in enumerate(order) if opcode.startswith("HADD2")]
    assert len(widened) >= 9 * 8  # nine tensors of half numbers
    # The sample that stays as it is has code of its own, after everything.
    assert sum(i < min(widened) for i in wide) >= 2 * 9
    # In double the widest is 16 bytes, and a half type's two elements are a word.
    code = _machine_code(compiled)["mixed_kernel<double, 2>"]
    assert _count(code, r"LDG\b.*\.128") == 10
    assert _count(code, r"LDG\b.*\.U?(8|16)\b") == 0


@needs_nvcc
def test_cuda_randn_computes_each_chunk_once_and_stores_16_bytes_per_access(compiled: Compiled) -> None:
    if compiled.source != "randn.cu":
        pytest.skip(f"{compiled.source} holds another kernel")
    code = _machine_code(compiled)
    for name, (_, width) in zip(RANDN, WIDTHS.items(), strict=True):
        chunks = max(width, 4) // 4
        assert _count(code[name], r"STG\b.*\.128") == max(width, 4) // width, name
        ptx = compiled.ptx[name]
        # Two transforms a chunk: of each two words and the inverse of one become floats, unsigned and to the nearest;
        # one root; and the fma of csrc/philox.h, 11 for the logarithm, 7 for the angle and 2 for the root.
        assert len(re.findall(r"\bcvt\.rn\.f32\.u32\b", ptx)) == 3 * 2 * chunks
        assert len(re.findall(r"\brsqrt\.approx\.ftz\.f32\b", ptx)) == 2 * chunks
        assert len(re.findall(r"\bfma\.rn\.f32\b", ptx)) == (11 + 7 + 2) * 2 * chunks
        # Ten rounds of two products; of a constant second counter the first is computed by the compiler.
        assert len(re.findall(r"\bmul\.wide\.u32\b", ptx)) >= 2 * 10 * chunks


#: Kernels of the reductions that read whole samples, and how many accesses of 16 bytes are in flight: four rounds of a
#: block, once more where the deviation looks again, and of both factors of a product.
READERS = {
    "reduce.cu": {("sum_kernel", 0): 4, ("sum_kernel", 1): 8, ("sum_kernel", 2): 4, ("sum_kernel", 3): 8},
    "select.cu": {("select_kernel", 0): 1, ("select_kernel", 1): 1},
}


@needs_nvcc
def test_reductions_on_cuda_read_16_bytes_per_access(compiled: Compiled) -> None:
    if compiled.source not in READERS:
        pytest.skip(f"{compiled.source} holds another kernel")
    code = _machine_code(compiled)
    for (kernel, variant), accesses in READERS[compiled.source].items():
        for stored in ("half", "nv_bfloat16", "float", "double"):
            name = f"{kernel}<{stored}, {variant}>"
            # The compiler may unroll a loop further.
            assert _count(code[name], r"LDG\b.*\.128") >= accesses, name


@needs_nvcc
def test_cuda_kernels_use_no_local_memory(compiled: Compiled) -> None:
    assert {name: n for name, code in _machine_code(compiled).items() if (n := _count(code, r"(LDL|STL)\b"))} == {}


@needs_nvcc
def test_cuda_arithmetic_is_neither_contracted_nor_reordered(compiled: Compiled) -> None:
    _machine_code(compiled)
    assert compiled.ptx
    for name, code in compiled.ptx.items():
        # ptxas fuses a product and a sum only where neither names its rounding.
        opcodes = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|ex2|lg2|rsqrt)\.[\w.]*f(?:16|32|64)\w*", code))
        # What CUDA's expf consists of: an approximation of 2 to a power, and a rounding to an integer by a sum.
        opcodes -= {"ex2.approx.ftz.f32", "fma.rm.f32"}
        # What the root of drawn noise begins with; see test_root_of_drawn_noise_is_made_like_sqrt.
        opcodes -= {"rsqrt.approx.ftz.f32"}
        assert [op for op in opcodes if not re.match(r"\w+\.rn\.f", op)] == [], name
        # To the nearest, whatever is narrowed, and no integer becomes a float in another way.
        # The reductions store their compute dtype.
        own = compiled.source in KERNELS
        narrowed = {"half": {"cvt.rn.f16.f32"}, "nv_bfloat16": {"cvt.rn.bf16.f32"}} if own else {}
        every = {"cvt.rn.f16.f32", "cvt.rn.bf16.f32"}
        code = re.sub(r"\b(cvt\.rn\.b?f16)x2\.", r"\1.", code)  # two at once
        stored = re.search(r"<(\w+)[,>]", name)[1]  # type: ignore[index]
        wanted = (
            every if re.search("more|mixed|^log_prob|^diffusion_loss_gradient", name) else narrowed.get(stored, set())
        )
        assert set(re.findall(r"\bcvt\.[\w.]*f16\w*\.f32", code)) == wanted, name
        assert set(re.findall(r"\bcvt\.[\w.]*f32\.(?:f64|u32|s32)", code)) <= {
            "cvt.rn.f32.f64",
            "cvt.rn.f32.u32",
            "cvt.rn.f32.s32",
        }, name


#: What csrc/philox.h says in PTX, beside the root that CUDA computes.
ROOTS = """
#include "philox.h"
extern "C" __global__ void by_ptxas(float* x) { *x = sqrtf(*x); }
extern "C" __global__ void by_philox(float* x) { *x = fastdiff::root_of_normal(*x); }
"""


def _root(code: str) -> None:
    """Assert that a function computes t + h·(x − t²) with r = rsqrt(x), t = r·x and h = r/2."""
    code = code.partition("EXIT")[0]  # what follows serves other arguments
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?P\d )?\s*([A-Z][\w.]*) ([^;/]*)", code, re.MULTILINE)
    found = [(op, [word.strip().removesuffix(".reuse") for word in words.split(",")]) for _, op, words in lines]

    def result(op: str, *operands: str) -> str:
        """Return the destination of an instruction with these operands, the factors in any order."""
        left = sorted(operands[:2]), list(operands[2:])
        fits = [words[0] for name, words in found if name == op and (sorted(words[1:3]), words[3:]) == left]
        assert len(fits) == 1, (op, operands, code)
        return fits[0]

    inverse, x = next(words for op, words in found if op == "MUFU.RSQ")
    root, half = result("FMUL.FTZ", x, inverse), result("FMUL.FTZ", inverse, "0.5")
    result("FFMA", result("FFMA", f"-{root}", root, x), half, root)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_root_of_drawn_noise_is_made_like_sqrt(tmp_path: Path, arch: str) -> None:
    # The instructions of sqrt.rn, which is correctly rounded, where its argument is far from the ends of the exponent.
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of the triton package")
    source = tmp_path / "roots.cu"
    source.write_text(ROOTS, encoding="utf-8")
    _run(f"{HOME}/bin/nvcc", *setup_py.NVCC_FLAGS, "-std=c++17", "-I", CSRC, f"-arch={arch}", "-cubin", source,
         "-o", tmp_path / "roots.cubin")  # fmt: skip
    listing, _ = _run(tool, "-sass", tmp_path / "roots.cubin")
    codes = dict(part.split("\n", 1) for part in listing.split("Function : ")[1:])
    assert codes.keys() == {"by_ptxas", "by_philox"}
    for code in codes.values():
        _root(code)
    # sqrt.rn asks whether the bits of x are from 0x0d000000 to 0x7f7fffff: 2⁻¹⁰¹ to the largest number.
    assert re.search(r"0xf3000000|-0xd000000", codes["by_ptxas"])
    assert "0x727fffff" in codes["by_ptxas"]
    assert "CALL" in codes["by_ptxas"]
    assert "CALL" not in codes["by_philox"]


def test_cuda_sources_include_only_cuda_and_standard_library() -> None:
    assert SOURCES
    seen, left = set(), list(SOURCES)
    while left:
        path = left.pop()
        seen.add(path)
        for opening, name in re.findall(r"^\s*#\s*include\s*([<\"])([^>\"]+)", path.read_text(), re.MULTILINE):
            own = next((p.resolve() for p in (path.parent / name, CSRC / name) if p.is_file()), None)
            if opening == '"':
                assert own is not None, f"{path.name} includes {name}, which is not in csrc"
                assert CSRC in own.parents
            if own is not None and own not in seen:
                left.append(own)
            if own is None:
                # Headers of the standard library have no folder.
                assert re.fullmatch(r"cuda_\w+\.h|[a-z_]+|(math|stdint|stddef|string|float|limits)\.h", name), name
