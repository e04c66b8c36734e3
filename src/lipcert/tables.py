"""Results as tables on the terminal."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lipcert import losses
from lipcert.bound_table import BoundTable
from lipcert.kinds import Kind
from lipcert.locality import Part
from lipcert.recipe import Recipe, settings


def _print(*things: Any) -> None:
    console = Console(highlight=False)
    console.width = max(80, console.width)  # in less, columns would be squeezed to nothing
    for thing in things:
        console.print(thing)


def _table(title: str, *columns: str, rigid: bool = False) -> Table:
    """The first column says what a row is; a rigid table breaks lines there only, if it has to."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        justify: Any = "left" if place == 0 else "right"
        no_wrap = rigid and place > 0
        table.add_column(column, justify=justify, overflow="fold", no_wrap=no_wrap)
    return table


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def list_recipes(recipes: Sequence[Recipe]) -> None:
    """One line a recipe."""
    table = Table(Column("recipe", no_wrap=True), "data", "what it is")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.data, recipe.summary)
    _print(table)


def show_recipe(recipe: Recipe) -> None:
    """One recipe with its settings and published numbers."""
    title = f"{recipe.name}: {recipe.summary}"
    table = Table("setting", "value", title=title, title_justify="left")
    for name, value in settings(recipe).items():
        table.add_row(name, str(value))
    table.add_row("loss", f"{recipe.loss.__name__} {dict(recipe.loss_options) or ''}")  # type: ignore[attr-defined]
    if recipe.loss in (losses.cll, losses.cll_per_logit):
        table.add_row("calibration", _calibration(recipe))
    table.add_row("eps schedule", repr(recipe.eps_schedule))
    table.add_row("learning-rate schedule", repr(recipe.learning_rate_schedule))
    table.add_row("radii", ", ".join(recipe.radii))
    for name in ("penalties", "perturb", "after_step"):
        if part := getattr(recipe, name):
            table.add_row(name.replace("_", " "), _described(part))
    _print(table)
    if not recipe.published:
        _print("No published numbers: a recipe of ours.")
        return
    published = Table("published", "value", "source", "how sure")
    for p in recipe.published:
        published.add_row(p.what, f"{p.value:g}", p.source, p.certainty)
    _print(published)


def _calibration(recipe: Recipe) -> str:
    """How steep the logistic of the loss is when the training ends."""
    parameters = inspect.signature(recipe.loss).parameters
    options = {name: parameters[name].default for name in ("slack", "sigma")}
    options |= dict(recipe.loss_options)
    options |= {name: at(1.0) for name, at in recipe.loss_schedules.items()}
    if (sigma := options["sigma"]) is None:
        eps = recipe.eps * recipe.eps_schedule(1.0)
        sigma = losses.calibration(eps, options["slack"]).sigma
    return f"sigma {_number(sigma)}, Lipschitz constant {_number(1 / sigma)}"


def _described(part: Any) -> str:
    """A function of a recipe, or several, by name."""
    if isinstance(part, tuple):
        return ", ".join(_described(p) for p in part)
    if isinstance(part, functools.partial):
        options = ", ".join(f"{k}={v}" for k, v in part.keywords.items())
        return f"{_described(part.func)}({options})"
    return getattr(part, "__name__", repr(part))


def show_training(last: dict[str, Any]) -> None:
    """The last line of the metrics."""
    table = _table("Training", "epochs", "loss", "train", "validation", "validation CRA (estimate)")
    table.add_row(
        str(last["epoch"]),
        f"{last['loss']:.4f}",
        _percent(last["train_accuracy"]),
        _percent(last["validation_accuracy"]),
        _percent(last["validation_cra_estimate"]),
    )
    _print(table)


def show_bounds(found: BoundTable) -> None:
    """Bounds one beside the other, then the layers of the product bound."""
    over = _table(
        "Lipschitz bounds (L2); Jacobian norms sampled: up to "
        f"{_number(found.sampled_lower_bound)}",
        *("bound", "kind", "K of the\nlogits", "K /\nbest", "K /\nsampled"),
        *("median K\nof pairs", "s"),
        rigid=True,
    )
    for row in found.bounds:
        over.add_row(
            row.bound,
            row.kind,
            _number(row.lipschitz),
            f"{row.ratio:#.4g}",
            _loose(row.lipschitz, found.sampled_lower_bound) if row.eps is None else "-",
            _number(row.median_pair),
            f"{row.seconds:.2f}",
        )
    layers = _table(
        "The product bound layer by layer; loose = bound / sampled",
        *("layer", "node", "constant", "bound\nso far", "sampled", "loose", "share"),
        rigid=True,
    )
    for layer in found.layers:
        layers.add_row(
            layer.name,
            layer.op,
            _number(layer.gain),
            _number(layer.prefix),
            _number(layer.sampled),
            _loose(layer.prefix, layer.sampled),
            f"{100 * layer.share:.0f} %",
        )
    _print(over, layers)


def _loose(bound: float, sampled: float) -> str:
    return f"{bound / sampled:#.4g}" if sampled > 0 else "-"


def show_summary(summary: dict[str, Any], attack: dict[str, Any] | None = None) -> None:
    """Certified accuracy at the radii of interest."""
    estimate = summary["kind"] == Kind.ESTIMATE
    what = "ESTIMATED accuracy (no certificate)" if estimate else "certified accuracy"
    table = _table(
        f"{summary['recipe']}: {summary['data']}, {summary['split']}, {summary['samples']} samples"
        f"\nkind {summary['kind']}, bound {summary['bound']}",
        *("L2 radius", what, "accuracy under attack"),
    )
    attacked = (attack or {}).get("robust_accuracy", {})
    table.add_row("0 (clean)", _percent(summary["clean_accuracy"]), "")
    for text, fraction in summary["cra"].items():
        under = attacked.get(text, {}).get("value")
        table.add_row(text, _percent(fraction), _percent(under))
    _print(table)
    acr = _number(summary["acr"])
    _print(f"Average certified radius {acr}, median {_number(summary['median_radius'])}.")
    if attack is not None:
        _print_inside(attack)


def show_locality(locality: dict[str, Any]) -> None:
    """What the local bound gains, and where the radii came from."""
    eps = locality["eps"]
    table = _table(
        f"What {locality['bound']} gains at {eps}", "proved with", "certified accuracy", "K"
    )
    constants = {
        Part.GLOBAL: locality["median_global"],
        Part.CONSTANTS: locality["median_local"],
    }
    for part in Part:
        constant = _number(constants[part]) if part in constants else ""
        table.add_row(part.words, _percent(locality["cra"][part]), constant)
    _print(table)
    by = ", ".join(f"{name or 'none'} {n}" for name, n in locality["proved_by"].items())
    _print("K: median constant of the predicted class against its rival.")
    _print(f"Samples by the bound that proved their radius: {by}.")
    layers = ", ".join(f"{row['name']} {_percent(row['share'])}" for row in locality["layers"])
    if layers:
        _print(f"Units that cannot change in the ball: {layers}.")


def show_attack(results: dict[str, Any]) -> None:
    """What the attack found, at all radii tried so far and inside the certified balls."""
    at = {"pgd": results.get("robust_accuracy", {}), **results.get("others", {})}
    if any(at.values()):
        table = _table(
            "Accuracy under attack", "L2 radius", "attack", "accuracy", "samples", "effort"
        )
        for attack, found in at.items():
            for text, r in found.items():
                effort = f"{r['steps']} steps x {r['restarts']} starts"
                table.add_row(text, attack, _percent(r["value"]), str(r["samples"]), effort)
        _print(table)
    _print_inside(results)


def show_inequality(results: dict[str, Any]) -> None:
    """The medians of the four radii, and how each compares with the one before."""
    names = list(results["medians"])
    words = {
        "certified": "the certificate",
        "sampled_global": "no certificate: slopes seen",
        "sampled_local": "no certificate: slopes near",
        "smallest_perturbation": f"found: {results['attacks']}",
    }
    table = _table(
        f"Radii of {results['samples']} samples (L2), medians", "radius", "median", "ratio", "what"
    )
    ratios = results["ratios"]
    for name, before in zip(names, [None, *names], strict=False):
        ratio = ratios[f"{name} / {before}"] if before else None
        table.add_row(name, _number(results["medians"][name]), _number(ratio), words[name])
    _print(table)
    whole = _number(ratios[f"{names[-1]} / {names[0]}"])
    _print(
        f"Ratio: median over the samples of this radius to the one above; from the first to the "
        f"last {whole}. Smallest perturbations below sampled_local: "
        f"{results['perturbations_below_sampled_local']}."
    )


def _print_inside(results: dict[str, Any]) -> None:
    inside = results.get("inside")
    if inside:
        _print(
            f"Attacked inside {inside['attacked']} certified balls ({inside['steps']} steps x "
            f"{inside['restarts']} starts): {inside['flipped']} predictions changed."
        )
