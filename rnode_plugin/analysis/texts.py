"""The sentences in a diagnosis, by check and outcome. Each placeholder is a number or a word from the finding."""

from __future__ import annotations

SOLVER_GAP = "solver gap"
TOLERANCE = "tolerance"
INVERTIBILITY = "invertibility"
NORMALIZATION = "normalization"
GRADIENT = "gradient"
SAMPLES = "samples"
GAUSSIAN = "gaussian"

FAILED = "A solver fails on held-out data: {failure} No verdict is possible until the solver succeeds."
"""The sentence for a check that relies on a solver which fails."""

FOUND = {
    SOLVER_GAP: (
        "The solver {solver} changes the NLL by {gap:+.2g} ± {gap_error:.1g} nats/dim compared with an accurate "
        "solver ({typical_gap:.2g} for a single sample). It takes {nfe:.0f} evaluations instead of "
        "{nfe_accurate:.0f}. "
    ),
    TOLERANCE: (
        "The NLL is {nll:.4f} ± {nll_error:.2g} nats/dim. It changes by {last_change:.2g} between the tolerances "
        "{last:g} and {tightest:g}. "
    ),
    INVERTIBILITY: (
        "Held-out data return from the latent with an error of {error:.2g} of their spread, root mean square, by "
        "{solver}. The worst sample has an error of {largest:.2g}. "
    ),
    NORMALIZATION: (
        "The log-density of the model differs by at most {difference:+.2g} nats from the change of variables with "
        "the Jacobian of the whole map. {allowed:.2g} nats are allowed, for {samples:.0f} samples with exact "
        "traces and an accurate solver. "
    ),
    GRADIENT: (
        "The gradient of the log-density by automatic differentiation differs by at most {difference:.2g} of its "
        "size from difference quotients along {directions:.0f} random directions of the parameters. {allowed:.2g} "
        "is allowed. "
    ),
    SAMPLES: (
        "A classifier separates samples from held-out data in {percent:.1f} % of cases. Guessing gives "
        "{guess_low:.1f} to {guess_high:.1f} % with {samples:.0f} of each. "
    ),
    GAUSSIAN: (
        "The NLL of the model is {nll:.4f} nats/dim, the NLL of {family} is {nll_gaussian:.4f}. The mean "
        "difference over the same {samples:.0f} samples is {difference:+.2g} ± {difference_error:.1g}. "
    ),
}
"""The first sentences of each check, before the meaning."""

MEANING = {
    (SOLVER_GAP, "small"): "The steps are fine enough.",
    (SOLVER_GAP, "visible"): "Report densities by an accurate solver, and consider a smaller step in training.",
    (SOLVER_GAP, "large"): (
        "The solver is too coarse for this field. Use a smaller step or an adaptive solver, and train again if the "
        "model was trained with this solver."
    ),
    (TOLERANCE, "converged"): (
        "A tolerance of {enough_tolerance:g} is enough for an error of {limit:g} nats/dim. It takes "
        "{enough_nfe:.0f} evaluations instead of {nfe_tightest:.0f}."
    ),
    (TOLERANCE, "loose"): (
        "The tolerance {own_tolerance:g} of the model has an error of {own_distance:.2g} nats/dim. Use "
        "{enough_tolerance:g} or less."
    ),
    (TOLERANCE, "rough"): (
        "It has not converged, because the field is too rough for this precision. Use larger penalties, or "
        "evaluate in double precision."
    ),
    (INVERTIBILITY, "inverse"): "Samples follow the density that the model reports.",
    (INVERTIBILITY, "coarse"): (
        "With an accurate solver the error is {error_accurate:.2g}, so samples do not follow the reported density "
        "closely. Use a smaller {what}."
    ),
    (INVERTIBILITY, "no inverse"): (
        "With an accurate solver the error is {error_accurate:.2g}, so the inverse does not undo the forward "
        "direction. Look for an error in the inverse of the model."
    ),
    (NORMALIZATION, "normalized"): "The density integrates to one.",
    (NORMALIZATION, "not normalized"): (
        "The density does not integrate to one. Look for a missing or doubled term of the log-determinant, such as "
        "a scale or a logit, for its sign, and for an error in the products that the field computes."
    ),
    (GRADIENT, "right"): "Training uses the gradient of the density that the model reports.",
    (GRADIENT, "wrong"): (
        "Training uses another gradient. Look for a layer whose backward pass is a kernel or runs under no_grad, "
        "and for a field whose own products lose their graph."
    ),
    (GRADIENT, "rough"): (
        "The quotients of two lengths differ by {doubt:.2g}, because the log-density is not smooth enough in the "
        "parameters or in single precision."
    ),
    (SAMPLES, "same"): "No difference is seen.",
    (SAMPLES, "too few"): (
        "Smaller differences cannot be seen. Take more held-out data (in a run, by a larger data.held_out of a "
        "table, or by more pictures in the folder val)."
    ),
    (SAMPLES, "different"): (
        "Samples differ from the data. Compare them by eye, and train longer or with a larger field."
    ),
    (SAMPLES, "separated"): (
        "Samples are not like the data. Do not use them in place of data. Train longer or with a larger field."
    ),
    (GAUSSIAN, "better"): "The model is better than the Gaussian.",
    (GAUSSIAN, "equal"): "The difference can be chance. The data may be Gaussian. Otherwise train longer.",
    (GAUSSIAN, "worse"): (
        "The model is worse than the Gaussian. Train longer, and check the learning rate and the scale of the data."
    ),
}
"""The meaning of a finding and advice, by check and outcome."""

INSTEAD = {
    (SOLVER_GAP, "fails"): (
        "The solver {solver} fails on held-out data: {failure} Numbers that were measured with it mean nothing. "
        "Train with a smaller step."
    ),
    (TOLERANCE, "fails"): (
        "The solver fails at tolerance {failed_at:g}: {failure} The density cannot be computed this accurately. "
        "The field is stiff or not smooth. Train it with penalties, or with a smaller learning rate."
    ),
    (NORMALIZATION, "too large"): (
        "The Jacobian of the whole map takes {dims:.0f} backward passes through a solve, and the limit is "
        "{limit:.0f} ({largest:.0f} for fields with a radius). Check a smaller model with the same layers."
    ),
    (GRADIENT, "refused"): "The log-density has no gradient: {failure}",
    (GRADIENT, "no parameters"): "The model has no parameters to differentiate with respect to.",
    (SAMPLES, "left out"): (
        "{samples:.0f} held-out samples are too few to train a classifier. Use at least {fewest:.0f}."
    ),
    (SAMPLES, "not finite"): "Some samples of the model are not finite. Sample with a more accurate solver.",
    (GAUSSIAN, "left out"): (
        "{samples:.0f} held-out samples are too few to fit a Gaussian. Use at least {fewest:.0f}."
    ),
    (GAUSSIAN, "singular"): (
        "No Gaussian can be fitted, because columns of the held-out data are constant or depend on each other."
    ),
}
"""The whole text for outcomes in which a check could not measure its quantity."""


def text_of(name: str, outcome: str) -> str:
    """The text for a check with this outcome, with placeholders."""
    if (name, outcome) in INSTEAD:
        return INSTEAD[name, outcome]
    return FOUND[name] + MEANING[name, outcome]
