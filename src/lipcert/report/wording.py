"""What a report says in words: claims, warnings, commands, glossary."""

import shlex
from collections.abc import Iterable

from lipcert import recipes
from lipcert.attacking import refuted as refuted_by
from lipcert.external_attacks import AttackName
from lipcert.kinds import Kind
from lipcert.recipe import settings
from lipcert.report.markup import Html, join, percent, tag
from lipcert.report.results import Results
from lipcert.report.stored import Attacked, Summary, Tried
from lipcert.run import Run

GLOSSARY = {
    "Radius": (
        "L2 distance, in units of the network's input (pixels in [0, 1]), within which the "
        "predicted class cannot change. Images on which nothing is proved have radius 0."
    ),
    "CRA, also VRA": (
        "Certified (verified) robust accuracy at a radius: the part of all images that are "
        "classified right and whose prediction provably stays the same within that radius."
    ),
    "ACR": (
        "Average certified radius over all images; a wrong prediction counts as 0, also in the "
        "median radius."
    ),
    "Local bound": (
        "A bound that holds in a ball around one image only. Inside the ball many units stay "
        "constant or within narrow limits, so it can be smaller than a global bound, which holds "
        "everywhere. It says nothing beyond the ball."
    ),
    "Upper side": (
        "Accuracy under attack: the part of the images that the strongest attack left right. True "
        "robust accuracy lies between the certified and the attacked."
    ),
    "Kinds": (
        "Upper: proved, about the network in real arithmetic. Probabilistic: proved but for the "
        "stated probability of failure. Estimate: not proved, and no certificate."
    ),
}

BOUNDS_EXPLAINED = (
    "Constants of the logit vector, and of the differences of two logits. The largest Jacobian "
    "norm seen on images is {}: no global bound can be below it."
)

LAYERS_EXPLAINED = (
    "The product bound, layer by layer. Own constant: of this layer alone. Bound so far: of "
    "everything from the input up to and including the layer. Sampled: the largest Jacobian norm "
    "seen on images, below which the true constant cannot be. Looseness: bound over sampled, the "
    "most that the bound can be off by. Share: the part of the final looseness, on a log scale, "
    "that this layer adds."
)


LOCAL_BOUNDS_EXPLAINED = (
    "A local bound holds in balls around images; its row shows medians over a few of them, which "
    "bound nothing globally and may be below the largest Jacobian norm."
)

LOCALITY_EXPLAINED = (
    "Boxes say where each unit can be while the image stays in the ball; the worst last layer is "
    "the largest fall of a margin over ball and box. Constants around an image leave out units "
    "that cannot change in the ball; those of LipLT can be above the global ones. Median constant: "
    "of the predicted class against its rival, the class against which the global constants prove "
    "least."
)

NO_CONSTANT_UNITS = (
    "This network has no elementwise activations such as ReLU, so no unit is known to be constant "
    "in a ball."
)

_SAMPLED_EXPLAINED = {
    "sampled_global": (
        "No certificate: the margin over the largest slope seen at any point of any image."
    ),
    "sampled_local": "No certificate: the same, with the slopes seen near this image.",
    "smallest_perturbation": "Found: at this distance an attack changes the prediction.",
}


def adjective(kind: Kind) -> str:
    """What certificates of this kind may be called."""
    return "estimated" if kind is Kind.ESTIMATE else "certified"


def measure(kind: Kind) -> str:
    """The name of certified robust accuracy of this kind."""
    return "CRA estimate" if kind is Kind.ESTIMATE else "CRA"


def badge(summary: Summary) -> str:
    """The kind of a claim in a few words."""
    match summary.kind:
        case Kind.UPPER:
            return "upper: proved, in real arithmetic"
        case Kind.PROBABILISTIC:
            return f"probabilistic: may fail with probability {summary.failure_probability:.1e}"
        case Kind.ESTIMATE:
            return "ESTIMATE: no certificate"


def radii_explained(kind: Kind) -> dict[str, str]:
    """What each of the four radii of the inequality says, by its name."""
    proved = "Not proved" if kind is Kind.ESTIMATE else "Proved"
    return {"certified": f"{proved}: the prediction cannot change within it."} | _SAMPLED_EXPLAINED


def claim(summary: Summary) -> str:
    """What is proved, in one sentence, at the first of the radii of interest."""
    text, fraction = next(iter(summary.cra.items()))
    images = f"{percent(fraction)} of the {summary.samples} {summary.split} images"
    within = f"within an L2 distance of {text}"
    match summary.kind:
        case Kind.UPPER:
            return f"For {images} the predicted class is right and provably cannot change {within}."
        case Kind.PROBABILISTIC:
            return (
                f"But for a failure probability of {summary.failure_probability:.1e} in all, it is "
                f"proved that for {images} the predicted class is right and cannot change {within}."
            )
        case Kind.ESTIMATE:
            return (
                f"Nothing is proved. If the estimated constants were true bounds, then for "
                f"{images} the predicted class would be right and could not change {within}."
            )


def other_settings(run: Run) -> str:
    """What a run has not as its recipe says, where that may change results; empty if nothing."""
    if run.recipe.name not in recipes.names():
        return ""
    usual, chosen = settings(recipes.get(run.recipe.name)), settings(run.recipe)
    return ", ".join(
        f"{name} {short(chosen[name])} instead of {short(usual[name])}"
        for name in usual
        if chosen[name] != usual[name] and name not in ("data", "seed")
    )


def short(value: object) -> str:
    """A setting, not in all its digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def banner(name: str, title: str, text: object) -> Html:
    """A box that nobody overlooks: `name` is error or caution."""
    return tag("div", tag("strong", title), text, class_=f"banner {name}", role="alert")


def warnings(results: Results, of: str = "") -> Html:
    """Banners where there is no certificate, or where the attack contradicts it.

    Args:
        results: The run.
        of: Goes before every title, to name the run.
    """
    banners = []
    kind = results.summary.kind
    if kind is Kind.ESTIMATE:
        banners.append(
            banner(
                "caution",
                f"{of}ESTIMATE: these are not certificates",
                "The constants behind every radius of this run were estimated, and may be below "
                "the true ones. For certificates, certify with a true bound.",
            )
        )
    found = [_refuted_at(results, text, attack) for text, attack in results.contradictions()]
    inside = results.attack.inside
    if inside and inside.flipped:
        found.append(
            f"{inside.flipped} of {inside.attacked} predictions were changed inside their "
            f"{adjective(kind)} balls."
        )
    found_inside = results.inequality
    bound = results.summary.bound
    refuted = 0 if found_inside is None else int(refuted_by(found_inside, bound).sum())
    if refuted:
        found.append(
            f"{refuted} of {len(results.inequality or ())} {adjective(kind)} radii are above the "
            "smallest perturbation found, or above what the slopes seen allow."
        )
    if found:
        title, verdict = _VERDICTS[kind]
        banners.append(banner("error", f"{of}ERROR: {title}", " ".join([*found, verdict])))
    return join(*banners)


_BUG = "Do not use these numbers, and please report the bug with the run directory."
_VERDICTS = {
    Kind.UPPER: (
        "the attack contradicts the certificates",
        f"A proof and a counterexample cannot both be right: there is a bug. {_BUG}",
    ),
    Kind.PROBABILISTIC: (
        "the attack contradicts the certificates",
        f"Unless the unlikely failure has happened, there is a bug. {_BUG}",
    ),
    Kind.ESTIMATE: ("the attack refutes the estimate", "The radii are larger than the true ones."),
}


def _refuted_at(results: Results, text: str, found: Attacked) -> str:
    certified = results.certified(text, found.samples) / found.samples
    return (
        f"At {text} the attack ({found.attack}) left {percent(found.value)} of {found.samples} "
        f"images right, but {percent(certified)} of them are {adjective(results.summary.kind)}."
    )


def effort(found: Tried, samples: int) -> str:
    """How hard an attack tried; `samples` is how many there are in all."""
    part = f"first {found.samples} images, " if found.samples < samples else ""
    tries = f"{found.steps} steps, {found.restarts} starts, seed {found.seed}"
    return f"{part}{found.attack}: {tries}"


def attack_command(run: Run, radii: Iterable[str], found: Tried | None = None) -> str:
    """The command that attacks at these radii (none: inside the balls), as hard as `found` did."""
    options = [word for text in radii for word in ("--eps", text)]
    if found is not None:
        numbers = ("steps", "restarts", "samples", "seed")
        options += [word for n in numbers for word in (f"--{n}", str(getattr(found, n)))]
        options += [] if found.attack is AttackName.PGD else ["--attack", found.attack]
    return shlex.join(["lipcert", "attack", str(run.folder), *options])


def all_commands(results: Results) -> list[str]:
    """The commands that make the run and this report of it once more."""
    run, summary = results.run, results.summary
    if run.recipe.name not in recipes.names():
        return [f"# {run.recipe.name} is no recipe of the command line; use lipcert.train"]
    folder = str(run.folder)
    train = ["lipcert", "train", run.recipe.name, "--out", folder]
    certify = ["lipcert", "certify", folder, "--bound", summary.bound]
    certify += [word for text in summary.cra for word in ("--eps", text)]
    usual = settings(recipes.get(run.recipe.name))
    for name, value in settings(run.recipe).items():
        train += ["--set", f"{name}={value}"] if value != usual[name] else []
    if summary.data != run.recipe.data:
        certify += ["--data", summary.data]
    attack = results.attack
    attacks = [attack_command(run, [t], found) for t, found in attack.all()]
    if attack.inside:
        attacks.append(attack_command(run, [], attack.inside))
    if results.inequality is not None:
        about = results.inequality.about
        numbers = about | {"samples": str(len(results.inequality))}
        names = ("steps", "restarts", "samples", "seed")
        words = [word for n in names for word in (f"--{n}", numbers[n])]
        attacks.append(shlex.join(["lipcert", "attack", folder, "--inequality", *words]))
    return [
        shlex.join(train),
        shlex.join(certify),
        *attacks,
        shlex.join(["lipcert", "report", folder]),
    ]
