"""A report of finished runs: Markdown with pictures, and the table as CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bap.files import write_bytes
from bap.results.pictures import plot_accuracy, plot_budgets, plot_curves, plot_kept, plot_layers, plot_overlap
from bap.results.published import DECATHLON_ROWS, SKETCH_ROWS
from bap.results.scores import DECATHLON_BASELINE, shown_score
from bap.train.checkpoint import load_checkpoint
from bap.train.run_log import read_results

__all__ = [
    "csv_table",
    "latex_table",
    "make_report",
    "markdown_table",
    "plot_accuracy",
    "plot_curves",
    "plot_kept",
    "result_cells",
    "results_table",
    "speed_table",
]


def _domains_of(results: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Domains of all runs, in the order in which they come."""
    return list(dict.fromkeys(name for _, run in results for name in run["accuracy"]))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a line end after it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def result_cells(results: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of :func:`results_table`."""
    names = _domains_of(results)
    head = ["run", "β", "sharing", "split", *names, "mean", "S", "FLOP ×", "exact FLOP ×", "Params ×", "union", "∩"]
    rows = []
    for title, run in results:
        cost = run["cost"]
        score = shown_score(run.get("scores"))
        s = "–" if score is None else f"{score[0]:.0f}" + (f" ({score[1]})" if score[1] else "")
        cells = [title, f"{run['beta']:g}", run["sharing"] or "none", run.get("split", "not recorded")]
        cells += [f"{run['accuracy'][name]:.1f}" if name in run["accuracy"] else "–" for name in names]
        several = "" if len(run["accuracy"]) == len(names) else f" ({len(run['accuracy'])} domains)"
        cells += [f"{run['mean_accuracy']:.1f}{several}", s]
        cells += [f"{cost[key]:.3f}" for key in ("flop", "exact_flop", "params")]
        cells += [f"{run['union']:.3f}", f"{run['intersection']:.3f}"]
        rows.append(cells)
    return head, rows


def results_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table, a row for every run; a domain that a run does not have is a dash.

    S of a part of the domains, or of validation images, says so in its cell.
    """
    return markdown_table(*result_cells(results))


def csv_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The runs as CSV, a row for each run and domain, at full precision, for other programs.

    Examples:
        >>> from bap.results.report import csv_table
        >>> cost = {"flop": 0.5, "exact_flop": 0.4, "params": 0.9}
        >>> run = {"beta": 0.5, "sharing": None, "split": "test", "accuracy": {"a": 61.25}, "kept": {"a": 0.5}}
        >>> run["cost"] = cost
        >>> print(csv_table([("half", run)]).replace(chr(13), ""), end="")
        run,beta,sharing,split,domain,accuracy,kept,flop,exact_flop,params
        half,0.5,none,test,a,61.25,0.5,0.5,0.4,0.9
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["run", "beta", "sharing", "split", "domain", "accuracy", "kept", "flop", "exact_flop", "params"])
    for title, run in results:
        own = [title, run["beta"], run["sharing"] or "none", run.get("split", "not recorded")]
        costs = [run["cost"][key] for key in ("flop", "exact_flop", "params")]
        for name, accuracy in run["accuracy"].items():
            writer.writerow([*own, name, accuracy, run["kept"].get(name), *costs])
    return text.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "β": r"$\beta$", "×": r"$\times$", "∩": r"$\cap$", "–": "--",
    "±": r"$\pm$",
}  # fmt: skip


def latex_table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 4) -> str:
    """A LaTeX tabular with booktabs' rules.

    Args:
        head, rows: cells, as for :func:`markdown_table`.
        texts: columns that are aligned left, the first ones.
    """
    escaped = [["".join(_LATEX.get(letter, letter) for letter in cell) for cell in row] for row in (head, *rows)]
    body = [" & ".join(row) + r" \\" for row in escaped]
    begin = r"\begin{tabular}{" + "l" * texts + "r" * (len(head) - texts) + "}"
    return "\n".join([begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"])


def speed_table(report: Mapping[str, Any]) -> str:
    """What :func:`bap.prune.deploy.speed_report` returns as a Markdown table, with a line on memory."""
    rows, parameters, memory = report["domains"], report["parameters"], report["bytes"]
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return (
        f"{markdown_table(list(rows[0]), cells)}\n\nOne forward of {report['batch']} images, {report['threads']} "
        f"threads, median. All domains together hold {parameters['after']:,} parameters instead of "
        f"{parameters['before']:,}: {memory['after'] / 2**20:.2f} MiB instead of {memory['before'] / 2**20:.2f}."
    )


def _published(data: str, results: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Published rows, if every run is comparable: test images of all domains."""
    rows = {"decathlon": DECATHLON_ROWS, "sketch": SKETCH_ROWS}.get(data, ())
    if not rows:
        return []
    lines = ["", "## Published", ""]
    for title, run in results:
        score = shown_score(run.get("scores"))
        comparable = run.get("protocol", {}).get("data") == data and run.get("protocol", {}).get("whole")
        if score is None or score[1] or not comparable or not run["scores"].get("published_baseline"):
            reason = "without a score" if score is None else score[1] or "an extract, or relative to another baseline"
            return [
                *lines,
                "Published rows are left out: they are of the test images of all domains, and "
                f"{title} is not ({reason}).",
            ]
    lines += [
        "[P]: stated in a published table or public code; [Q]: quoted from memory. Recomputed: S of the row's "
        "published accuracies by our formula, without a mark; they are printed with two digits, which moves S by "
        'up to 0.6 %. Rows without S publish accuracies only. "This" is the run of this report.',
        "",
    ]
    names = list(DECATHLON_BASELINE) if data == "decathlon" else []
    table = []
    for row in rows:
        cells = [row.method, "–" if row.s is None else f"{row.s:.0f}", f"[{row.mark}]"]
        cells.append("–" if row.recomputed is None else f"{row.recomputed:.0f}")
        cells += ["–" if value is None else f"{value:g}" for value in (row.flop, row.params)]
        table.append([*cells, *(f"{row.accuracy[name]:.2f}" if name in row.accuracy else "–" for name in names)])
    for title, run in results:
        score = shown_score(run["scores"])
        assert score is not None
        cells = [
            f"This: {title}",
            f"{score[0]:.0f}",
            "",
            "–",
            f"{run['cost']['flop']:.3f}",
            f"{run['cost']['params']:.3f}",
        ]
        table.append([*cells, *(f"{run['accuracy'][name]:.2f}" for name in names)])
    head = ["Method", "S", "Mark", "S recomputed", "FLOP ×", "Params ×", *names]
    return [*lines, markdown_table(head, table)]


def make_report(folders: Sequence[str | Path], out: str | Path, served: str | None = None) -> Path:
    """Writes report.md with its pictures, results.csv and results.tex for one or several finished runs.

    Args:
        folders: of the runs; pictures of channels and curves are those of the first.
        out: folder for the report.
        served: table of times of the pruned network, see :func:`speed_table`.

    Returns:
        The path of report.md.

    Raises:
        ValueError: if no run is given.
        FileError: if a run has no results, or damaged ones.
    """
    out = Path(out)
    if not folders:
        raise ValueError("make_report(): expected `folders` to name a run, got none.")
    results = [(Path(folder).resolve().name, read_results(folder)) for folder in folders]
    first = Path(folders[0])
    _, config, _ = load_checkpoint(first / "checkpoint")
    plot_kept(first / "checkpoint", out / "kept.png")
    plot_layers(first / "checkpoint", out / "layers.png")
    plot_overlap(first / "checkpoint", out / "overlap.png")
    plot_curves(first, out / "curves.png")
    plot_budgets(first, out / "budgets.png")
    plot_accuracy(results, out / "accuracy_budget.png")
    lines = ["# Budget-aware pruning", "", results_table(results), ""]
    lines += [
        "FLOP × is the mean over domains of the multiply-adds of the channels that are on, as the papers count; exact "
        "FLOP × leaves out filters that nothing reads. Params × is what all domains need together: shared weights left "
        "after pruning, batch norm of every domain, one bit for each switch; classifiers excluded.",
        "",
        *(["## Time and memory as it is served", "", served, ""] if served else []),
        f"## Channels of {first.name}",
        "",
        "![channels](kept.png)",
        "",
        "![layers](layers.png)",
        "",
        "![overlap](overlap.png)",
        "",
        "## Accuracy against budget",
        "",
        "![accuracy](accuracy_budget.png)",
        "",
        f"## Training of {first.name}",
        "",
        "![curves](curves.png)",
        "",
        "![budgets](budgets.png)",
        "",
        "The table is also in results.csv, at full precision, and results.tex.",
    ]
    lines += _published(config.data.suite, results)
    write_bytes(out / "results.csv", csv_table(results).encode())
    write_bytes(out / "results.tex", (latex_table(*result_cells(results)) + "\n").encode())
    write_bytes(out / "report.md", ("\n".join(lines) + "\n").encode())
    return out / "report.md"
