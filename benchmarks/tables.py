"""The results of ``benchmarks/run.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from straightforward import STRAIGHTFORWARD

Result = Mapping[str, Any]
_TITLES = {"train": "Training step", "explain": "Explaining, without files", "decode": "Decoding (DiffExplainer)"}
_AS_BUILT = "as built"


def markdown(content: Mapping[str, Any]) -> str:
    """All tables; ``content`` is what ``results.json`` holds."""
    results = list(content["cells"].values())
    done = [result for result in results if "failed" not in result]
    parts = [_header(content, results)]
    for work, title in _TITLES.items():
        parts.append(_section(title, _speed(_of(done, "speed", work))))
        parts.append(_section(f"{title}: peak memory, MiB", _memory(_of(done, "memory", work))))
    parts.append(_section("explain.py with reading and writing", _files(_of(done, "files"), _of(done, "speed"))))
    parts.append(_section("Search of StylEx", _search(_of(done, "search"))))
    parts.append(_section("Time to a fixed quality (validation images)", _quality(_of(done, "quality"))))
    parts.append(_section("Loss curves", _curves(_of(done, "curve"))))
    parts.append(_section("Training with decoding from files", _steady(_of(done, "steady"))))
    failed = [[_name(result), result["failed"]] for result in results if "failed" in result]
    parts.append(_section("Not measured", _table(["cell", "reason"], failed)))
    parts.append(_section("The straightforward implementations", _ways(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(content: Mapping[str, Any], results: list[Result]) -> str:
    settings, dates = content["settings"], sorted(result["date"][:10] for result in results)
    machine = ", ".join(f"{name} {value}" for name, value in content["machine"].items())
    return (
        f"{dates[0] if dates else '-'} to {dates[-1] if dates else '-'}; {machine}; "
        f"{'small' if settings['small'] else 'published'} widths, untrained networks but for the time to a quality. "
        "Ratios are how many times longer the other one takes, round by round: median (quartiles); n rounds."
    )


def _section(title: str, body: str) -> str:
    return f"### {title}\n\n{body}" if body else ""


def _table(titles: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [" | ".join(str(value) for value in row) for row in rows]
    if not lines:
        return ""
    return "\n".join(f"| {line} |" for line in (" | ".join(titles), " | ".join(["---"] * len(titles)), *lines))


def _of(results: list[Result], measure: str, work: str | None = None) -> list[Result]:
    return [r for r in results if r["cell"]["measure"] == measure and work in (None, r["cell"]["work"])]


def _name(result: Result) -> str:
    return " ".join(str(value) for value in result["cell"].values() if value != "")


def _speed(results: list[Result]) -> str:
    rows = []
    for result in results:
        cell, ratios = result["cell"], dict(result["ratio"])
        over_fp32 = ratios.pop("fp32", None)
        rows.append(
            [
                *(cell["method"], cell["size"], cell["variant"], result["images"]),
                f"{result['seconds'][_AS_BUILT] * result['images']:.4g}",
                f"{result['images_per_second'][_AS_BUILT]:.4g}",
                _ratio(over_fp32) if over_fp32 else "1",
                "; ".join(f"{name} {_ratio(ratio)}" for name, ratio in ratios.items()) or "none",
                result["rounds"],
                _differences(result),
            ]
        )
    titles = ["method", "px", "variant", "images", "s", "images/s", "fp32 / this", "straightforward / this", "n"]
    return _table([*titles, "difference of the answers"], rows)


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _differences(result: Result) -> str:
    """Of the straightforward implementations from ours in fp32; half precision rounds, which says nothing of them."""
    shown = []
    for name, tolerance in result["tolerance"].items():
        difference = result["difference"][name]
        shown.append(f"{difference:.0e}" + ("" if difference <= tolerance else f", more than {tolerance:g}"))
    return "; ".join(shown) or "-"


def _memory(results: list[Result]) -> str:
    grouped: dict[tuple[Any, ...], dict[str, float]] = {}
    for result in results:
        cell = result["cell"]
        row = grouped.setdefault((cell["method"], cell["size"], cell["variant"], result["images"]), {})
        row[cell["who"]] = result["peak_mib"]
    rows = [
        [
            *key,
            f"{peaks[_AS_BUILT]:.0f}" if _AS_BUILT in peaks else "-",
            "; ".join(f"{who} {peak:.0f}" for who, peak in peaks.items() if who != _AS_BUILT) or "-",
        ]
        for key, peaks in grouped.items()
    ]
    return _table(["method", "px", "variant", "images", _AS_BUILT, "straightforward"], rows)


def _files(results: list[Result], speeds: list[Result]) -> str:
    without = {
        (r["cell"]["method"], r["cell"]["size"]): r["images_per_second"][_AS_BUILT]
        for r in speeds
        if (r["cell"]["work"], r["cell"]["variant"]) == ("explain", "fp32")
    }
    rows = []
    for result in results:
        cell, rate = result["cell"], without.get((result["cell"]["method"], result["cell"]["size"]))
        rows.append(
            [
                *(cell["method"], cell["size"], result["images"], result["batch_size"]),
                f"{result['images_per_second'][_AS_BUILT]:.4g}",
                f"{rate:.4g}" if rate else "-",
                _ratio(result["ratio"]["--batch-size 1"]),
                result["rounds"],
            ]
        )
    titles = ["method", "px", "images", "--batch-size", "images/s", "images/s without files", "--batch-size 1 / this"]
    return _table([*titles, "n"], rows)


def _search(results: list[Result]) -> str:
    rows = []
    for result in results:
        for name in ("EigenFind", "AttFind"):
            rows.append(
                [
                    *(name, result["cell"]["size"], result["images"]),
                    f"{result['seconds_per_image'][f'{name}, {_AS_BUILT}']:.4g}",
                    f"{result['seconds_per_image'][f'{name}, loop']:.4g}",
                    _ratio(result["ratio"][f"{name} loop"]),
                    result["rounds"],
                    f"{result['difference'][name]:.0e}",
                ]
            )
    titles = ["search", "px", "images", "s per image", "s per image, loop", "loop / this", "n"]
    return _table([*titles, "largest difference of logits"], rows)


def _quality(results: list[Result]) -> str:
    rows = [
        [
            *(result["cell"]["method"], result["cell"]["variant"], result["goal"]),
            f"{result['seconds']:.0f}" if result["reached"] else f"not reached in {result['seconds']:.0f}",
            result["batches"],
        ]
        for result in results
    ]
    return _table(["method", "variant", "goal", "s of training", "iterations"], rows)


def _curves(results: list[Result]) -> str:
    """One row per term; its values at a few iterations one after the other, and the validation at the end."""
    parts = []
    for key in dict.fromkeys((r["cell"]["method"], r["cell"]["size"]) for r in results):
        mine = [r for r in results if (r["cell"]["method"], r["cell"]["size"]) == key]
        shown = mine[0]["losses"][:: max(1, len(mine[0]["losses"]) // 5)]
        batches = [at["batches"] for at in shown]
        rows: list[list[Any]] = []
        for name in shown[0]:
            if name != "batches":
                curves = [[at[name] for at in r["losses"] if at["batches"] in batches] for r in mine]
                rows.append([name, *(" ".join(f"{value:.3g}" for value in curve) for curve in curves)])
        for name, value in mine[0]["validation"].items():
            if name.startswith("val/"):
                rows.append([name, f"{value:.4g}", *(f"{r['validation'][name]:.4g}" for r in mine[1:])])
        title = (
            f"{key[0]}, {key[1]} px, after {', '.join(map(str, batches))} iterations; val/ after {mine[0]['batches']}"
        )
        parts.append(title + "\n\n" + _table(["term", *(r["cell"]["variant"] for r in mine)], rows))
    return "\n\n".join(parts)


def _steady(results: list[Result]) -> str:
    rows = []
    for result in results:
        cell, busy = result["cell"], result["utilisation"]
        shown = f"{busy:.0f} % ({result['samples']} samples)" if busy is not None else result["why_no_utilisation"]
        rate = f"{result['images_per_second'][_AS_BUILT]:.4g}"
        rows.append([cell["method"], cell["size"], cell["variant"], result["workers"], rate, shown])
    return _table(["method", "px", "variant", "loader processes", "images/s", "GPU utilisation"], rows)


def _ways(results: list[Result]) -> str:
    seen = dict.fromkeys((r["cell"]["work"], r["cell"]["method"]) for r in results if r["cell"]["measure"] == "speed")
    lines = [
        f"- {method}, {work}, *{name}*: {way.what}."
        for work, method in seen
        for name, way in STRAIGHTFORWARD.get((work, method), {}).items()
    ]
    if ("train", "DiffusionAutoencoder") in seen:
        lines.append("- DiffusionAutoencoder, train: none; its training is the published one.")
    return "\n".join(lines)
