"""Every number that an evaluation can report: its key, direction, range, meaning and what it needs.

Keys follow evaluation, section 2; adding one is allowed, renaming is a breaking change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]
Need = Literal[
    "explanation",
    "counterfactual",
    "decomposition",
    "agnostic",
    "reconstruction",
    "curves",
    "mask",
    "truth",
    "path",
    "intended",
    "features",
    "stages",
    "second",
    "iso",
    "ranked",
    "multi_label",
    "cycles",
    "diversity",
    "sanity",
    "lpips",
    "inception",
    "user",
    "face",
    "simsiam",
    "oracle",
    "asked",
    "table",
    "cuda",
]
#: Which images a metric is about (evaluation, R2).
Population = Literal["all", "flipped", "correct"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        key: Its name everywhere: tables, JSON, logs.
        better: Which direction is better; ``neither`` for context.
        value_range: As a reader writes it.
        meaning: One line under the table.
        needs: What must be there; otherwise it is skipped with the reason of ``MISSING``.
        title: Heading in the short table; empty for what is only in the full one.
        published: The population of the published protocol (DiME, ACE), which ``--protocol ace`` takes; ours is all.
    """

    key: str
    better: Better
    value_range: str
    meaning: str
    needs: tuple[Need, ...]
    title: str = ""
    published: Population = "all"


#: The sentence that a skipped metric gets for the first need that is not met.
MISSING: dict[Need, str] = {
    "explanation": "the explainer gave no explanation",
    "counterfactual": "this explainer makes no counterfactual image",
    "decomposition": "this explainer does not split an image into parts",
    "agnostic": "this explainer shows no agnostic part",
    "reconstruction": "this explainer does not render the image itself",
    "curves": "switched off: evaluate with curve steps of at least 1",
    "mask": "the data has no known mask: only synthetic data has",
    "truth": "the data has no known counterfactual: only synthetic data has",
    "path": "this explainer shows no path to a counterfactual",
    "intended": "this explainer does not say what its steps are meant to be",
    "features": "the classifier's features cannot be read",
    "stages": "the classifier has no layers that can be watched",
    "second": "no second classifier: give a file of one with --second",
    "iso": "none of its edits makes the classifier as sure as asked",
    "ranked": "this explainer does not choose among ranked directions",
    "multi_label": "the classifier knows no other labels than the one that is explained",
    "cycles": "switched off, since it asks every explainer eleven times more: --cycles",
    "diversity": "switched off, since it asks every explainer again: --diversity N, from 2 on",
    "sanity": "switched off, since it asks every explainer again twice: --sanity",
    "lpips": "needs a backbone: --weights lpips=FILE; lpips_f stands in",
    "inception": "needs Inception's weights: --weights inception=FILE; fid_f and kid_f stand in",
    "user": "needs a feature extractor of yours: --weights user=FILE; fid_f and kid_f stand in",
    "face": "needs a face embedding: --weights face=FILE; only for faces; sim_f stands in",
    "simsiam": "needs SimSiam's weights: --weights simsiam=FILE; sim_f stands in",
    "oracle": "needs a classifier of many labels: --weights oracle=FILE; collateral may stand in",
    "asked": "needs the label that is asked for: --asked NAME with an oracle",
    "table": "needs the data's labels and the one that is asked for: an oracle, --attributes CSV and --asked NAME",
    "cuda": "is measured on a GPU only",
}

#: What is compared at equal confidence.
ISO_CLOSENESS = ("l1", "l2", "changed_area", "area90", "gini", "lpips_f")
ISO_REALISM = ("fid_f", "kid_f")
_ALWAYS: tuple[Need, ...] = ("explanation",)
_EDIT: tuple[Need, ...] = ("counterfactual",)
_SPLIT: tuple[Need, ...] = ("decomposition",)
_TRUE_SPLIT: tuple[Need, ...] = ("decomposition", "truth")
_MASKED_SPLIT: tuple[Need, ...] = ("decomposition", "mask")


def _set_distances(name: Literal["inception", "user"], features: str) -> tuple[Metric, ...]:
    """The distances of sets of images in someone else's features (5)."""
    needs: tuple[Need, ...] = ("counterfactual", name)
    return (
        Metric(f"fid_{name}", "lower", "[0, inf)", f"as fid_f, in {features}", needs, published="flipped"),
        Metric(f"fid_{name}_floor", "neither", "[0, inf)", f"as fid_f_floor, in {features}", needs),
        Metric(f"sfid_{name}", "lower", "[0, inf)", f"as sfid_f, in {features}", needs, published="flipped"),
        Metric(f"kid_{name}", "lower", "(-e, inf)", f"as kid_f, in {features}", needs, published="flipped"),
    )


METRICS: tuple[Metric, ...] = (
    # --- reconstruction, before everything else: where it alone changes the decision, the autoencoder is explained ---
    Metric(
        "recon_flip",
        "lower",
        "[0, 1]",
        "share of images decided otherwise after rendering alone",
        ("reconstruction",),
        "recon flip",
    ),
    Metric(
        "psnr", "higher", "dB", "of the method's own rendering of the image, at most 100", ("reconstruction",), "PSNR"
    ),
    Metric("ssim", "higher", "[-1, 1]", "of the method's own rendering of the image", ("reconstruction",), "SSIM"),
    # --- removing the class-distinct part (DXAI, section 5; evaluation, section 7.4) ---
    Metric(
        "dxai_auc_label",
        "lower",
        "[0, 1/A(0)]",
        "area under accuracy while the true class's distinct part is removed, over clean accuracy A(0); 1 = no effect",
        _SPLIT,
        "AUC label",
    ),
    Metric(
        "dxai_auc_prediction",
        "lower",
        "[0, 1/A(0)]",
        "as dxai_auc_label with the distinct part of the predicted class",
        _SPLIT,
        "AUC pred.",
    ),
    Metric(
        "dxai_auc_fidelity",
        "lower",
        "[0, 1]",
        "as dxai_auc_prediction, counting agreement with the decision on the image instead of accuracy",
        _SPLIT,
        "AUC fid.",
    ),
    Metric("dxai_auc_label_raw", "lower", "[0, 1]", "area of dxai_auc_label, not divided by A(0)", _SPLIT),
    Metric("dxai_auc_prediction_raw", "lower", "[0, 1]", "area of dxai_auc_prediction, not divided by A(0)", _SPLIT),
    Metric(
        "removal_auc",
        "lower",
        "[0, 0.2/A(0)]",
        "area under accuracy over A(0) while up to 20 % of the pixels, largest distinct part first, turn grey; "
        "0.2 = no effect",
        _SPLIT,
        "removal",
    ),
    Metric("outside_range", "neither", "[0, 1]", "share of the sweep's values that no image file could hold", _SPLIT),
    Metric("additivity", "lower", "[0, inf)", "largest |image - sum of the parts|, in [0, 1] units", ("agnostic",)),
    # --- is the agnostic part undecided? ---
    Metric(
        "kl_agnostic", "lower", "[0, inf)", "KL(uniform || classifier) of the generated agnostic part", ("agnostic",)
    ),
    Metric("kl_removed", "lower", "[0, inf)", "KL(uniform || classifier) of image - distinct", _SPLIT, "KL"),
    Metric("max_p_agnostic", "lower", "[1/K, 1]", "largest class probability of the agnostic part", ("agnostic",)),
    Metric("max_p_removed", "lower", "[1/K, 1]", "largest class probability of image - distinct", _SPLIT, "max p"),
    Metric("accuracy_agnostic", "neither", "[0, 1]", "share of agnostic parts decided as the label", ("agnostic",)),
    Metric("accuracy_removed", "neither", "[0, 1]", "share of image - distinct decided as the label", _SPLIT),
    Metric(
        "former_p_agnostic", "neither", "[0, 1]", "probability of the former class on the agnostic part", ("agnostic",)
    ),
    Metric("former_p_removed", "neither", "[0, 1]", "probability of the former class on image - distinct", _SPLIT),
    # --- counterfactual: decision ---
    Metric("flip_rate", "higher", "[0, 1]", "share of counterfactuals decided as their target", _EDIT, "flip"),
    Metric("flip_rate_saved", "higher", "[0, 1]", "as flip_rate, judged on the saved 8-bit image", _EDIT),
    Metric("flip_rate_any", "higher", "[0, 1]", "share of counterfactuals decided as any other class", _EDIT),
    Metric("delta_p", "higher", "[-1, 1]", "signed change of the target's probability", _EDIT),
    Metric("mad", "higher", "[0, 1]", "absolute change of the target's probability; blind to the wrong way", _EDIT),
    Metric("bkl", "lower", "[0, 1]", "1 - probability of the target on the counterfactual", _EDIT),
    Metric(
        "robust_flip",
        "higher",
        "[0, 1]",
        "share of flips that survive the worst of 8 bits, JPEG, blur and half the size, where the image's own does",
        _EDIT,
        "robust",
    ),
    Metric("robust_flip_quant8", "higher", "[0, 1]", "flips that survive 8 bits", _EDIT),
    Metric("robust_flip_jpeg90", "higher", "[0, 1]", "flips that survive JPEG of quality 90", _EDIT),
    Metric("robust_flip_blur1", "higher", "[0, 1]", "flips that survive a blur of 1 pixel at 128 pixels height", _EDIT),
    Metric("robust_flip_down_up", "higher", "[0, 1]", "flips that survive half the size and back", _EDIT),
    Metric(
        "transfer_flip",
        "higher",
        "[0, 1]",
        "share decided as the target by a second classifier that agreed on the image",
        ("counterfactual", "second"),
        "transfer",
    ),
    Metric(
        "collateral",
        "lower",
        "[0, L-1]",
        "other labels of the classifier that changed with the one asked for",
        ("counterfactual", "multi_label"),
    ),
    # --- counterfactual: realism and similarity, in features of the classifier ---
    Metric(
        "fid_f",
        "lower",
        "[0, inf)",
        "Frechet distance of originals and edits in the classifier's features; which edits may fool",
        ("counterfactual", "features"),
        published="flipped",
    ),
    Metric(
        "fid_f_floor",
        "neither",
        "[0, inf)",
        "fid_f between two halves of what edits are compared with: no honest method is below it at this n",
        ("counterfactual", "features"),
    ),
    Metric(
        "sfid_f",
        "lower",
        "[0, inf)",
        "fid_f of edits and other originals, mean and range of ten random halves",
        ("counterfactual", "features"),
        published="flipped",
    ),
    Metric(
        "kid_f",
        "lower",
        "(-e, inf)",
        "kernel distance in the classifier's features",
        ("counterfactual", "features"),
        published="flipped",
    ),
    *_set_distances("inception", "Inception's features, as published"),
    *_set_distances("user", "the features of your own network"),
    Metric(
        "fva",
        "higher",
        "[0, 1]",
        "share of faces that a face network still takes for the same person (similarity above 0.5)",
        ("counterfactual", "face"),
        published="flipped",
    ),
    Metric("fs", "higher", "[-1, 1]", "cosine in a face network", ("counterfactual", "face"), published="flipped"),
    Metric("s3", "higher", "[-1, 1]", "cosine in SimSiam", ("counterfactual", "simsiam"), published="correct"),
    Metric(
        "mnac",
        "lower",
        "[0, A]",
        "attributes that changed in the eyes of the oracle, the one asked for included",
        ("counterfactual", "oracle"),
        published="flipped",
    ),
    Metric(
        "mnac_others",
        "lower",
        "[0, A-1]",
        "as mnac without the attribute asked for",
        ("counterfactual", "asked"),
        published="flipped",
    ),
    Metric(
        "cd",
        "lower",
        "[0, 2A]",
        "how differently attributes go along in edits and in the data, summed over attributes",
        ("counterfactual", "table"),
        published="flipped",
    ),
    Metric("cd_mean", "lower", "[0, 2]", "cd per attribute", ("counterfactual", "table"), published="flipped"),
    Metric("lpips", "lower", "[0, ~1]", "published perceptual distance", ("counterfactual", "lpips")),
    Metric(
        "sim_f",
        "neither",
        "[-1, 1]",
        "cosine of the classifier's features before and after, which are meant to move",
        ("counterfactual", "features"),
    ),
    Metric(
        "lpips_f",
        "lower",
        "[0, 4]",
        "distance of the classifier's maps; not comparable with published LPIPS",
        ("counterfactual", "stages"),
    ),
    # --- the way there ---
    Metric("mono", "higher", "[0, 1]", "share of steps on which the target's probability does not fall", ("path",)),
    Metric("rho", "higher", "[-1, 1]", "rank correlation of position and the target's probability", ("path",)),
    Metric("regress", "lower", "[0, 1]", "deepest fall of the target's probability along the path", ("path",)),
    Metric("crossing", "neither", "[0, 1]", "position at which the target's probability reaches one half", ("path",)),
    Metric(
        "schedule",
        "lower",
        "[0, 1]",
        "mean difference of the target's probability from what the method meant it to be",
        ("path", "intended"),
    ),
    Metric("smooth", "lower", "[1, inf)", "longest step over the mean one", ("path",)),
    Metric(
        "agree",
        "higher",
        "[0, 1]",
        "share of edited pictures on the way that are decided as the method meant; below 0.9 do not trust it",
        ("path", "intended"),
    ),
    Metric(
        "agent_kl",
        "lower",
        "[0, inf)",
        "KL(classifier || what the method meant) on edited pictures on the way",
        ("path", "intended"),
    ),
    Metric(
        "dir_sufficiency_1",
        "higher",
        "[0, 1]",
        "share of images that the best of the method's directions flips",
        ("counterfactual", "ranked"),
    ),
    Metric(
        "dir_sufficiency_3",
        "higher",
        "[0, 1]",
        "share of images that one of its three best directions flips",
        ("counterfactual", "ranked"),
    ),
    # --- counterfactual: closeness, on [0, 1] images ---
    Metric("l1", "lower", "[0, 1]", "mean absolute change of a pixel", _EDIT, "l1"),
    Metric("l2", "lower", "[0, 1]", "root of the mean squared change", _EDIT),
    Metric("linf", "lower", "[0, 1]", "largest change", _EDIT),
    Metric("changed_area", "lower", "[0, 1]", "share of pixels with a change above 8/255", _EDIT),
    Metric("area90", "lower", "(0, 1]", "smallest share of pixels that holds 90 % of the change", _EDIT),
    Metric("gini", "higher", "[0, 1)", "concentration of the change", _EDIT),
    Metric(
        "l1_edit",
        "lower",
        "[0, 1]",
        "as l1, from the method's own rendering: what the decision changed without what rendering changed",
        ("counterfactual", "reconstruction"),
    ),
    Metric(
        "changed_area_edit",
        "lower",
        "[0, 1]",
        "as changed_area, from the rendering",
        ("counterfactual", "reconstruction"),
    ),
    # --- asked again (9.2, 9.3, 9.7) ---
    Metric(
        "composition_1",
        "lower",
        "[0, 1]",
        "l1 after asking for the class that the image has; what a method does when it is asked for nothing",
        ("counterfactual", "cycles"),
    ),
    Metric("composition_10", "lower", "[0, 1]", "l1 after asking so ten times in a row", ("counterfactual", "cycles")),
    Metric(
        "reversibility_l1",
        "lower",
        "[0, 1]",
        "l1 between the image and the edit of its edit back to the first class, of what was flipped",
        ("counterfactual", "cycles"),
    ),
    Metric(
        "reversibility",
        "higher",
        "[0, 1]",
        "share of flipped images that are decided as at first after going back",
        ("counterfactual", "cycles"),
    ),
    Metric(
        "sigma_l",
        "neither",
        "[0, 4]",
        "lpips_f (lpips where it is there) between edits with other random numbers; 0 for methods without any",
        ("counterfactual", "diversity"),
    ),
    Metric(
        "sanity_head",
        "higher",
        "[0, 2]",
        "1 - rank correlation of the explanation with that for a random last layer; near 0 it ignores the classifier, "
        "or has learned it by heart",
        ("explanation", "sanity"),
    ),
    Metric("sanity_all", "higher", "[0, 2]", "as sanity_head, all layers random", ("explanation", "sanity")),
    # --- curves ---
    Metric(
        "cout",
        "higher",
        "[-1, 1]",
        "do the few most-changed pixels carry the decision? exact areas",
        ("counterfactual", "curves"),
        published="correct",
    ),
    Metric(
        "ins_auc",
        "higher",
        "[0, 1]",
        "probability while pixels are inserted into a blurred image, attribution first",
        ("explanation", "curves"),
    ),
    Metric(
        "del_auc",
        "lower",
        "[0, 1]",
        "probability while pixels are blurred, attribution first",
        ("explanation", "curves"),
    ),
    # --- known truth, in [0, 1] units ---
    Metric("mask_mass", "higher", "[0, 1]", "share of |distinct| inside the true mask", _MASKED_SPLIT, "mask"),
    Metric("mask_chance", "neither", "[0, 1]", "what an even map scores in mask_mass", ("mask",)),
    Metric("mask_lift", "higher", "[0, 1/chance]", "mask_mass over chance", _MASKED_SPLIT),
    Metric("leak", "lower", "[0, 1]", "mean |distinct| outside the mask", _MASKED_SPLIT),
    Metric(
        "mask_mass_cf",
        "higher",
        "[0, 1]",
        "share of |image - counterfactual| inside the mask",
        ("counterfactual", "mask"),
    ),
    Metric(
        "mask_mass_edit",
        "higher",
        "[0, 1]",
        "share of |rendering - counterfactual| inside the mask",
        ("counterfactual", "reconstruction", "mask"),
    ),
    Metric(
        "mask_mass_attribution",
        "higher",
        "[0, 1]",
        "share of the attribution inside the mask",
        ("explanation", "mask"),
    ),
    Metric(
        "correlation",
        "higher",
        "[-1, 1]",
        "over pixels, of |distinct| and |image - true counterfactual|",
        _TRUE_SPLIT,
        "corr.",
    ),
    Metric(
        "signed_cosine",
        "higher",
        "[-1, 1]",
        "of distinct and image - true counterfactual, mean-free, with sign",
        _TRUE_SPLIT,
    ),
    Metric("amplitude", "neither", "[0, 1]", "mean |distinct|", _SPLIT),
    Metric("true_amplitude", "neither", "[0, 1]", "mean |image - true counterfactual|", ("truth",)),
    Metric(
        "l1_truth",
        "lower",
        "[0, 1]",
        "l1 between counterfactual and the exact one (images the classifier has right)",
        ("counterfactual", "truth"),
        "l1 truth",
    ),
    # --- cost (10) ---
    Metric(
        "s_per_image",
        "lower",
        "s",
        "median over batches of one explanation, reading and measuring excluded",
        _ALWAYS,
        "s/image",
    ),
    Metric("s_per_image_p95", "lower", "s", "95th percentile over batches", _ALWAYS),
    Metric("classifier_forwards", "lower", "[0, inf)", "pictures shown to the classifier per image", _ALWAYS, "calls"),
    Metric("classifier_backwards", "lower", "[0, inf)", "gradients taken through the classifier per image", _ALWAYS),
    Metric("peak_memory", "lower", "MiB", "largest memory of an explained batch on the GPU", ("explanation", "cuda")),
)


def iso_key(level: float, name: str) -> str:
    """The key of a metric at equal confidence, such as ``iso_0.9_l1``."""
    return f"iso_{level:g}_{name}"


def iso_metrics(levels: Sequence[float]) -> tuple[Metric, ...]:
    """The metrics of the smallest edits that make the classifier as sure as ``levels`` ask, see ``equal_strength``."""
    closeness = {metric.key: metric for metric in METRICS if metric.key in ISO_CLOSENESS}
    found: list[Metric] = []
    for level in levels:
        sure = f"the smallest edit with a probability of the target of at least {level:g}"
        found.append(Metric(iso_key(level, "reached"), "higher", "[0, 1]", f"share of images that have {sure}", _EDIT))
        for key, metric in closeness.items():
            needs: tuple[Need, ...] = (*metric.needs, "iso")
            found.append(Metric(iso_key(level, key), metric.better, metric.value_range, f"{key} of {sure}", needs))
    return tuple(found)
