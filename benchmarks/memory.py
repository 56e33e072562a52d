"""The count of a training step's memory against what steps take: tensors' bytes at their peak, in the second step.

    python -m benchmarks.memory [--quick]

Small models train for real; d12 and larger ones on fake tensors, which have sizes and no bytes, through the same code
and autograd. Kernels are the CPU's either way. Main memory and the device are one here, so a case with weights in main
memory is compared as a sum. On a machine with a GPU, real steps there are compared with torch's own count.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.memory_cases import measured_bytes, measured_on_gpu
from benchmarks.report import Report
from diloco.execution import Execution
from diloco.memory import CUDA_OVERHEAD, Work, footprint
from diloco.optimizers import OptimizerName
from mmdit.presets import PRESETS, of_depth

GB = 1e9
_PLAIN = Execution()
_AGAIN = Execution(checkpointing=True)
_NARROW = Execution(checkpointing=True, keeping="narrow")
_HOST = Execution(checkpointing=True, keeping="host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step. `limit` is the card, in GB, that it must fit with CUDA's own share, or None."""

    name: str
    work: Work
    execution: Execution
    fake: bool
    limit: int | None = None


def _cases(*, quick: bool) -> Iterator[Case]:
    yield from _small_cases()
    if not quick:
        yield from _large_cases()


def _small_cases() -> Iterator[Case]:
    digits = Work(
        config=PRESETS["digits"], image_tokens=16, text_tokens=6, batch=32, precision="fp32", optimizer="adamw"
    )
    hidden_256 = replace(
        digits, config=replace(of_depth(4), joint_attention_dim=512), image_tokens=256, text_tokens=77, batch=4
    )
    for work, name in ((digits, "digits"), (hidden_256, "hidden 256")):
        for execution in (_PLAIN, _AGAIN, _NARROW, _HOST, Execution(parts=2), replace(_HOST, parts=2)):
            yield Case(name=name, work=work, execution=execution, fake=False)
            yield Case(name=name, work=replace(work, precision="bf16"), execution=execution, fake=False)
    no_norm = replace(hidden_256.config, qk_norm=None)
    dual = replace(hidden_256.config, dual_attention_layers=(0, 1))
    for config, name in ((no_norm, "hidden 256, no norm"), (dual, "hidden 256, dual")):
        for execution in (_PLAIN, _AGAIN):
            work = replace(hidden_256, config=config, precision="bf16")
            yield Case(name=name, work=work, execution=execution, fake=False)
    factored = replace(hidden_256, precision="bf16", optimizer="adamw-factored")
    for execution in (_PLAIN, _NARROW):
        yield Case(name="hidden 256", work=factored, execution=execution, fake=False)


def _large_cases() -> Iterator[Case]:
    def case(
        depth: int, optimizer: OptimizerName, execution: Execution, *, batch: int = 1, limit: int | None = None
    ) -> Case:
        work = Work(
            config=of_depth(depth),
            image_tokens=1024,
            text_tokens=154,
            batch=batch,
            precision="bf16",
            optimizer=optimizer,
        )
        return Case(name=f"d{depth}", work=work, execution=execution, fake=True, limit=limit)

    yield case(12, "adamw", _PLAIN, batch=4)
    yield case(12, "adamw", _AGAIN, batch=8)
    yield case(18, "adamw", _PLAIN, batch=4)
    yield case(18, "adamw", _HOST, limit=12)
    yield case(18, "adamw", replace(_HOST, parts=2), batch=8, limit=12)
    yield case(18, "adamw-factored", _NARROW, limit=12)
    yield case(24, "adamw", _HOST, limit=24)
    yield case(24, "adamw", replace(_HOST, parts=2), batch=8, limit=24)
    yield case(24, "adamw-factored", _NARROW, batch=4, limit=24)


def main() -> int:
    """Measure every case; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="A training step's memory, counted and measured.")
    parser.add_argument("--quick", action="store_true", help="small models only; writes nothing")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    report, errors = Report(name="memory"), []
    for case in _cases(quick=quick):
        measured = measured_bytes(case.work, case.execution, fake=case.fake)
        counted = footprint(case.work, case.execution, "cpu")
        errors.append(
            _add_row(report, case, "cpu, fake" if case.fake else "cpu", measured, counted.device + counted.host)
        )
        if case.limit is not None:
            needed = (measured - counted.host + CUDA_OVERHEAD) / GB
            way = f"{case.work.optimizer}, {_way(case.execution)}"
            report.add_target(
                f"{case.name} in bf16, batch {case.work.batch}, {way}: GB on the card",
                target=f"under {case.limit}",
                value=round(needed, 2),
                met=needed < case.limit,
            )
    if torch.cuda.is_available():
        errors += _on_gpu(report, quick=quick)
    worst = max(errors)
    report.add_target("largest error of the count", target="at most 10 %", value=round(worst, 4), met=worst <= 0.1)
    return 0 if report.finish(quick=quick) else 1


def _on_gpu(report: Report, *, quick: bool) -> Iterator[float]:
    for case in _cases(quick=quick):
        counted = footprint(case.work, case.execution, "cuda").device - CUDA_OVERHEAD
        if counted > torch.cuda.mem_get_info()[0]:
            continue
        yield _add_row(report, case, "cuda", measured_on_gpu(case.work, case.execution), counted)
        gc.collect()
        torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    own = total - free - torch.cuda.memory_reserved()
    report.add_target(
        "CUDA's own share of the card, in GB (with whatever else runs there)",
        target=f"at most {CUDA_OVERHEAD / GB}",
        value=round(own / GB, 3),
        met=own <= CUDA_OVERHEAD,
    )


def _add_row(report: Report, case: Case, device: str, measured: int, counted: int) -> float:
    """Add a row; return the error."""
    report.add_row(
        case=case.name,
        device=device,
        precision=case.work.precision,
        optimizer=case.work.optimizer,
        batch=case.work.batch,
        way=_way(case.execution),
        measured_mb=round(measured / 1e6, 1),
        counted_mb=round(counted / 1e6, 1),
        error=round(counted / measured - 1, 4),
    )
    return abs(counted / measured - 1)


def _way(execution: Execution) -> str:
    words: list[str] = [] if execution.keeping == "whole" else [execution.keeping]
    words += ["recomputed"] if execution.checkpointing else []
    words += [f"{execution.parts} parts"] if execution.parts > 1 else []
    return ", ".join(words) or "plain"


if __name__ == "__main__":
    sys.exit(main())
