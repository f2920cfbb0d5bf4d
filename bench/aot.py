"""Compiles every Triton kernel ahead of time for sm_80, sm_90 and sm_100; no GPU is needed.

    python -m bench.aot                    every kernel, every configuration
    python -m bench.aot --only row_kernel  those whose name holds the text

Prints registers, bytes of stack and shared memory, and exits 1 where a kernel does not compile or
spills in a loop: a row kernel that does reads more than its logits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

# Both are read when a kernel is decorated or compiled.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from metis_kernels import _triton, advantages  # noqa: E402
from metis_kernels.logprobs import backward_kernel, forward_kernel  # noqa: E402
from metis_kernels.prefix_attention import MERGE_WARPS, merge_block, merge_kernel  # noqa: E402

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    "logits": None, "d_logits": None, "label": "i64", "group": "i64", "correct": "i1",
    "scored": "i1", "truncated": "i1", "alive": "i1", "qualifies": "i1",
    "acc_signal": "i1", "tool_signal": "i1", "out": None, "other": None, "rows": "i64",
}  # fmt: skip
"""Element type of a `NAME_ptr`; None is the dtype of the logits (of attention's outputs), what is
not named is fp32."""
INTEGERS = ("V", "N", "R")


@dataclass(frozen=True)
class Case:
    """A kernel with everything that makes it another binary."""

    name: str
    kernel: object
    logits: str
    constants: dict[str, object]
    warps: int

    def source(self) -> ASTSource:
        names = self.kernel.arg_names
        signature, attributes = {}, {}
        for index, name in enumerate(names):
            if name in self.constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                kind = POINTERS.get(name.removesuffix("_ptr"), "fp32")
                if name == "live_ptr":  # as wide as a logit
                    kind = "i16" if self.logits == "bf16" else "i32"
                signature[name] = "*" + (kind or self.logits)
            elif name in INTEGERS or name.startswith("stride_"):
                signature[name] = "i32"
            else:
                signature[name] = "fp32"
            # What the JIT finds out by itself: tensors are aligned, real vocabularies too.
            if signature[name].startswith("*") or name == "V" or name.startswith("stride_"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        return ASTSource(self.kernel, signature, constants, attributes)


def cases() -> Iterator[Case]:
    """Every configuration with the dtypes that it is chosen for, every branch of a kernel."""
    yield from row_kernels()
    yield from halves()
    yield from logprob_kernels()
    yield from merge_kernels()
    for std in (False, True):
        constants = dict(HAS_SCORED=True, HAS_TRUNCATED=True, STD=std)
        constants["BLOCK"] = advantages.BLOCK_ROLLOUTS
        label = f"advantages_kernel{' std' * std}"
        yield Case(label, advantages.advantages_kernel, "fp32", constants, advantages.WARPS)


VOCABULARIES = (1000, 151_936)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def row_configs() -> Iterator[tuple[str, int, int]]:
    """(dtype of the logits, block, warps) of every configuration that is ever chosen."""
    for name, dtype in DTYPES.items():
        for vocab in VOCABULARIES:
            yield name, *_triton.row_config(vocab, dtype)


def row_kernels() -> Iterator[Case]:
    everything = dict(HAS_OLD=True, HAS_REF=True, HAS_IS=True)
    nothing = dict.fromkeys(everything, False)
    branches = (("none", False), ("given", False), ("given", True), ("hdpo", False), ("hdpo", True))
    for (logits, block, warps), (gradient, entropy), softcap in itertools.product(
        row_configs(), branches, (False, True)
    ):
        flags = everything if gradient == "hdpo" and entropy else nothing
        constants = dict(GRADIENT=gradient, HAS_SOFTCAP=softcap, HAS_ENTROPY=entropy, BLOCK=block)
        constants |= dict(HAS_MARK=gradient == "hdpo" and entropy)
        label = f"row_kernel {gradient}{' entropy' * entropy}{' softcap' * softcap} {block}"
        yield Case(label, _triton.row_kernel, logits, constants | flags, warps)


def halves() -> Iterator[Case]:
    """Of the row kernel, for a head that is cut over the vocabulary."""
    for (logits, block, warps), softcap in itertools.product(row_configs(), (False, True)):
        constants = dict(HAS_SOFTCAP=softcap, BLOCK=block)
        label = f"statistics_kernel{' softcap' * softcap} {block}"
        yield Case(label, _triton.statistics_kernel, logits, constants, warps)
        label = f"gradient_kernel entropy{' softcap' * softcap} {block}"
        flags = constants | dict(HAS_ENTROPY=True, HAS_MARK=True)
        yield Case(label, _triton.gradient_kernel, logits, flags, warps)


def logprob_kernels() -> Iterator[Case]:
    for logits, block, warps in row_configs():
        label = f"logprobs.forward_kernel {block}"
        yield Case(label, forward_kernel, logits, dict(BLOCK=block), warps)
        for entropy in (False, True):
            constants = dict(HAS_G=True, HAS_ENTROPY=entropy, BLOCK=block)
            label = f"logprobs.backward_kernel{' entropy' * entropy} {block}"
            yield Case(label, backward_kernel, logits, constants, warps)


def merge_kernels() -> Iterator[Case]:
    for dtype, head_dim, rows in itertools.product(DTYPES, (64, 96, 128, 256), (False, True)):
        block_r, block_d = merge_block(head_dim)
        constants = dict(D=head_dim, HAS_ROWS=rows, BLOCK_R=block_r, BLOCK_D=block_d)
        label = f"merge_kernel{' rows' * rows} {head_dim}"
        yield Case(label, merge_kernel, dtype, constants, MERGE_WARPS)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    """Bytes of local memory of a thread: where registers go that are spilled."""
    looped: int
    """Instructions in loops that read or write it."""
    shared: int
    """Bytes of shared memory of a program."""


def compile_case(case: Case, architecture: int) -> Resources:
    """What the binary takes that triton itself makes, with its own options for ptxas."""
    compiled = triton.compile(
        case.source(),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(num_warps=case.warps),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = _run(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", file.name)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
        code = _run(triton.knobs.nvidia.nvdisasm, "-c", file.name) if stack else ""
    return Resources(registers, stack, local_accesses_in_loops(code), compiled.metadata.shared)


def _run(tool: triton.knobs.NvidiaTool, *arguments: str) -> str:
    done = subprocess.run([tool.path, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def local_accesses_in_loops(code: str) -> int:
    """Of a disassembly: instructions on local memory between a label and a branch back to it. A
    register that is put away before a loop and fetched after it costs nothing."""
    lines, labels, inside = code.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if found := re.match(r"(\.L_\w+):", line):
            labels[found[1]] = number
        elif found := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line):
            inside.update(range(labels.get(found[1], number), number))
    return sum(bool(re.search(r"\b(LDL|STL)\b", lines[number])) for number in inside)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT")
    args = parser.parse_args()
    chosen = [case for case in cases() if args.only in case.name]
    width = max((len(case.name) for case in chosen), default=0)
    print(f"triton {triton.__version__}; registers / bytes of stack / bytes of shared memory")
    print(" " * (width + 6 - 1), *(f"{f'sm_{a}':>16}" for a in ARCHITECTURES))
    failed = []
    for case in chosen:
        cells = []
        for architecture in ARCHITECTURES:
            r = compile_case(case, architecture)
            cells.append(f"{r.registers:>5} /{r.stack:>4} /{r.shared:>5}")
            if r.looped:
                failed.append(f"{case.name} {case.logits} spills in a loop on sm_{architecture}")
        print(
            f"{case.name:{width}} {case.logits:>5}", *(f"{cell:>16}" for cell in cells), flush=True
        )
    print("\n".join(failed) or f"{len(chosen)} kernels, no spill in a loop")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
