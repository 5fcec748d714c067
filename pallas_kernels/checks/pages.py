"""The report as pages to read."""

from __future__ import annotations

import typing

from pallas_kernels.checks.gates import GATES, Verdict
from pallas_kernels.device import device_kind

if typing.TYPE_CHECKING:
    from pallas_kernels.checks.report import Report, Row

COMMAND = "python scripts/check_kernels.py"
NOT_RUN = "not run"


def page(report: Report) -> str:
    """The whole report."""
    from pallas_kernels.checks.report import versions

    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = ["# Kernels: what was checked and measured", "", f"{report.date}, {device_kind()}. {named}.", ""]
    if report.ceilings is None:
        reason = report.no_gpu or "not asked for, or out of time"
        lines += [f"On a GPU: {NOT_RUN} ({reason}). No figure below is an estimate: what was not measured says so.", ""]
    else:
        lines += [
            f"Measured in this run: copy {report.ceilings.copy / 1e9:.0f} GB/s (read plus written), product of 8192 "
            f"cubed in bf16 {report.ceilings.product / 1e12:.0f} TFLOP/s. Times are medians of 20, over arguments "
            "larger than the second-level cache.",
            "",
        ]
    lines += [*_targets(report), *_cases(report)]
    if report.failures:
        lines += ["## Failures", "", *(f"- {_cell(failure)}" for failure in report.failures), ""]
    if report.absent:
        lines += ["## Absent", "", *(f"- `{module}`: {_cell(why)}" for module, why in report.absent.items()), ""]
    return "\n".join([*lines, f"Made by `{COMMAND}`.", ""])


def _targets(report: Report) -> list[str]:
    rows = [row for row in report.rows.values() if row.goal is not None]
    if not rows:
        return []
    lines = [
        "## Targets",
        "",
        "TFLOP/s of a backward pass are of it alone: its time with the forward pass, less the forward pass's own.",
        "",
        "| workload | goal | met | ms | TFLOP/s | of product | GB/s | of copy | peers, ms |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        met = NOT_RUN if row.met is None else ("yes" if row.met else "no")
        peers = ", ".join(f"{p.name} {f'{1e3 * p.seconds:.3f}' if p.seconds else p.reason}" for p in row.peers)
        cells = (row.case.name.removeprefix("target "), str(row.goal), met, *_speed(row), peers or NOT_RUN)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def _cases(report: Report) -> list[str]:
    lines = [
        "## Every case",
        "",
        "interpret: on the CPU, with race detection but for TPUs. lower: for an abstract H100, or a TPU. compile: "
        "ahead of time for an H100, without spills. numbers: on the GPU against float32.",
        "",
        f"| case | backend | {' | '.join(GATES)} | numbers | error | ms | TFLOP/s | of product | GB/s | of copy |",
        f"|---|---|{'---|' * len(GATES)}---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report.rows.values():
        gates = (_verdict(row.gates.get(gate)) for gate in GATES)
        errors = [] if row.gpu is None else [d["error"] for d in row.gpu.differences if d["kind"] == "relative"]
        numbers = NOT_RUN if row.gpu is None or row.gpu.passed is None else ("ok" if row.gpu.passed else "FAIL")
        error = f"{max(errors):.1e}" if errors else "-"
        cells = (row.case.name, row.case.backend, *gates, numbers, error, *_speed(row))
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return NOT_RUN
    if verdict.passed is None:
        # What a gate is not meant for needs no explanation in every row.
        return "-" if verdict.reason in ("too large to interpret", "a case of interpret mode") else NOT_RUN
    return "ok" if verdict.passed else "FAIL"


def _speed(row: Row) -> tuple[str, ...]:
    """ms, TFLOP/s, of product, GB/s, of copy."""
    if row.gpu is None or row.gpu.seconds is None:
        return (NOT_RUN,) * 5
    rate = row.rate if row.goal is not None else row.gpu.flops
    share = None if rate is None or row.gpu.flops is None else (row.gpu.of_product or 0) * rate / row.gpu.flops
    return (
        f"{1e3 * row.gpu.seconds:.3f}",
        "-" if rate is None else f"{rate / 1e12:.0f}",
        "-" if share is None else f"{share:.0%}",
        "-" if row.gpu.bandwidth is None else f"{row.gpu.bandwidth / 1e9:.0f}",
        "-" if row.gpu.of_copy is None else f"{row.gpu.of_copy:.0%}",
    )


def compiled_page(report: Report) -> str:
    """Every kernel's machine code."""
    from pallas_kernels.checks.report import versions

    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Kernels compiled ahead of time for an H100",
        "",
        "Read from what ptxas and nvdisasm say, on a machine that needs no GPU. Registers are those at launch: Mosaic "
        "GPU redistributes them among warpgroups afterwards. Shared memory of a block is at most 232448 bytes; HGMMA "
        "are tensor core instructions of a warpgroup, HMMA those of a warp.",
        "",
        f"{report.date}. {named}.",
        "",
        "| case | kernel | registers | spilled bytes | shared memory | HGMMA | HMMA | result |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in report.rows.values():
        verdict = row.gates.get("compile")
        if verdict is None or verdict.passed is None:
            continue
        result = "ok" if verdict.passed else f"FAIL: {verdict.reason}"
        for found in verdict.found or ({},):
            keys = ("name", "registers", "spill_bytes", "shared_memory", "hgmma", "hmma")
            numbers = ("-" if found.get(key) is None else str(found[key]) for key in keys)
            lines.append(f"| {' | '.join(map(_cell, (row.case.name, *numbers, result)))} |")
    return "\n".join([*lines, "", f"Made by `{COMMAND} --gates compile`.", ""])


def _cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "/").replace("\n", " ")[:240]
