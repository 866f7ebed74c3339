"""The other measurements of a case: activation means, bias shifts, gaps, steps and logs."""

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs

from .generation import RANDOM_IN_TRAINING, Case, repeatable
from .oracle import Oracle, log_likelihood

# A condition number of W beyond which updates are not compared.
MOST_CONDITION = 1e7


def compare(examination: Any, fishers: dict[str, bs.UnitFisher]) -> None:
    """Compares one or two of the other measurements, which the seed chooses."""
    if not fishers:
        return
    seed = examination.case.seed
    compare_moments(examination)
    (compare_shifts, compare_gap, compare_step)[seed % 3](examination, fishers)
    if seed % 4 == 0:
        compare_training(examination)


def called(examination: Any, what: str, function: Callable[[], Any]) -> Any:
    """The package's answer; a refusal of what `unit_fisher` has measured is a finding."""
    from .examination import Refused

    try:
        return examination.call(what, function)
    except Refused as refusal:
        message = str(refusal)
        if any(f"'{n}'" in message for n in examination.unfit | examination.optional):
            examination.outcome.refusals.append(f"{what}: {message[:140]}")
        else:
            examination.outcome.add("UNJUSTIFIED", f"{what}: {message}")
        return None


# -- activation moments ----------------------------------------------------------------------------


def compare_moments(examination: Any) -> None:
    """Means and variances of every call of every activation module, against hooks of the oracle."""
    case = examination.case
    size = case.options.get("batch_size")
    moments = called(
        examination,
        "activation_moments",
        lambda: bs.activation_moments(
            examination.model, case.probe[0], batch_size=size, **_inputs(case)
        ),
    )
    if moments is None:
        return
    oracle: Oracle = examination.oracle
    axes = {
        n: oracle.drawn.axes[m] for n, m in oracle.model.named_modules() if m in oracle.drawn.axes
    }
    values = _values(oracle, set(axes))
    moved = any(
        w in rule
        for rule in oracle.drawn.used
        for w in ("positions", "map.linear", "view", "to_sequence", "unreached")
    )
    for name, found in moments.items():
        base, _, call = name.partition("#")
        if base not in axes or moved:
            continue
        x = values[base][int(call or 0)].double()
        axis = axes[base] % x.dim()
        by_unit = x.movedim(axis, 0).flatten(1)

        def single(base: str = base, call: str = call, axis: int = axis) -> Tensor:
            v = _values(examination.single, {base})[base][int(call or 0)].double()
            v = v.movedim(axis, 0).flatten(1)
            return torch.stack([v.mean(1), v.var(1, correction=0)], 1)

        expected = torch.stack([by_unit.mean(1), by_unit.var(1, correction=0)], 1)
        both = torch.stack([found.mean, found.var], 1)
        examination.compare(f"moments of '{name}'", both, expected, single, 1e20)


def _values(oracle: Oracle, names: set[str]) -> dict[str, list[Tensor]]:
    """The outputs of modules, of all examples together: one entry per call."""
    values: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    handles = [
        m.register_forward_hook(lambda m, a, out, n=n: values[n].append([out.detach().clone()]))
        for n, m in oracle.model.named_modules()
        if n in names
    ]
    try:
        parts: dict[str, list[list[Tensor]]] = {name: [] for name in names}
        for i in range(len(oracle.x)):
            for of_name in values.values():
                of_name.clear()
            oracle.forward(oracle.x[i : i + 1])
            for name in names:
                parts[name].append([v[0] for v in values[name]])
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [torch.cat(c) for c in zip(*of_name, strict=True)] for name, of_name in parts.items()
    }


def _inputs(case: Case) -> dict[str, Any]:
    return {key: value for key, value in case.extra.items() if key == "inputs"}


# -- bias shift ------------------------------------------------------------------------------------


def compare_shifts(examination: Any, fishers: dict[str, bs.UnitFisher]) -> None:
    """An update by random numbers: its total shift, and what of it is the unit's own."""
    case, oracle = examination.case, examination.oracle
    was = {p: p.detach().clone() for p in examination.model.parameters()}
    names = {name for name, _ in examination.model.named_parameters()}
    before = oracle.seen()

    def update(model: nn.Module, dtype: torch.dtype) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in names:
                    g = torch.Generator().manual_seed(case.seed + zlib.crc32(name.encode()))
                    p += 0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)

    def measured() -> dict[str, Any]:
        options = {"batch_size": case.options.get("batch_size"), "layers": examination.only}
        with bs.bias_shift(examination.model, case.probe[0], **options, **_inputs(case)) as shifts:
            update(examination.model, case.dtype)
        result = dict(shifts)
        with torch.no_grad():
            for p, old in was.items():
                p.copy_(old)
        return result

    if examination.model.training:
        return
    shifts = called(examination, "bias_shift", measured)
    # The parametrized weights of the oracle are other parameters.
    plain = not any(hasattr(m, "parametrizations") for m in examination.model.modules())
    if shifts is None or not plain:
        return

    def expected(of: Oracle) -> dict[str, tuple[Tensor, Tensor, float]]:
        first = of.seen() if of is not oracle else before
        old = {n: (m.weight.detach().clone(), _bias(m)) for n, m in of.layers.items()}
        update(of.model, of.dtype)
        second = of.seen()
        totals = {}
        for name, layer in of.layers.items():
            a, b = first[name], second[name]
            if not a.positions:
                continue
            dw = _rows(layer, layer.weight.detach() - old[name][0])
            own = (dw.double() * a.incoming / a.positions).sum(1) + (_bias(layer) - old[name][1])
            size = float((a.net / a.positions).abs().max()) + float(own.abs().max())
            totals[name] = b.net / b.positions - a.net / a.positions, own, size
        return totals

    totals = expected(oracle)
    single: dict[str, Any] = {}
    for name, shift in shifts.items():
        if name not in totals:
            continue
        total, own, size = totals[name]
        sums = shift.own + shift.incoming + shift.second_order
        eps = torch.finfo(case.dtype).eps
        floor = size / (1e2 * eps) ** 2 * eps * 100

        def again(which: int, name: str = name) -> Tensor:
            if not single:
                single.update(expected(Oracle(case, torch.float32)))
            return single[name][which][:, None]

        for what, found, which in (
            ("total", shift.total, 0),
            ("parts", sums, 0),
            ("own", shift.own, 1),
        ):
            target = (total, own)[which][:, None]
            examination.compare(
                f"bias shift {what} of '{name}'", found[:, None], target,
                lambda which=which, again=again: again(which), floor,
            )  # fmt: skip
    examination.renew()


def _bias(layer: nn.Module) -> Tensor | float:
    return 0.0 if layer.bias is None else layer.bias.detach().double().clone()


def _rows(layer: nn.Module, weight: Tensor) -> Tensor:
    from .oracle import by_unit

    return by_unit(layer, weight, None)


# -- updates ---------------------------------------------------------------------------------------


def natural(
    F: Tensor, g: Tensor, bias: bool, damping: float, center: str = "q", scale: str = "full"
) -> tuple[Tensor, Tensor]:
    """The update of every unit, (units, params), and which of them are well defined.

    Theorem 1 and its relatives, from the matrix F of (w, w₀) and the gradient g of both. Without a
    bias the last column of both is there all the same; the bias's own update is 0 then.
    """
    updates, good = torch.zeros_like(g), torch.zeros(len(g), dtype=torch.bool)
    for u in range(len(g)):
        A, b, c = F[u, :-1, :-1], F[u, :-1, -1], F[u, -1, -1]
        if not c > 1e-9 * A.diagonal().mean() or not c > 1e-12:
            continue  # dead, or the bias has no influence
        m = b / c
        V = A / c - torch.outer(m, m)
        r = m if center == "q" else torch.zeros_like(m)
        W = V if center == "q" else A / c
        if scale == "diagonal":
            W = torch.diag(W.diagonal())
        if not V.diagonal().mean() > 1e-7 * (1 + m.square().mean()):
            continue
        W = W + damping * W.diagonal().mean() * torch.eye(len(W))
        if not bias:
            W = W + (torch.diag(r.square()) if scale == "diagonal" else torch.outer(r, r))
        good[u] = scale == "none" or bool(torch.linalg.cond(W) < MOST_CONDITION)
        dw = g[u, :-1] - g[u, -1] * r if bias else g[u, :-1]
        if scale != "none":
            dw = torch.linalg.solve(W, dw) / c
        dw0 = g[u, -1] / (1 if scale == "none" else c) - r @ dw
        updates[u] = torch.cat([dw, dw0[None] if bias else dw0[None] * 0])
    return updates, good


def compare_gap(examination: Any, fishers: dict[str, bs.UnitFisher]) -> None:
    """The cosine and the ratio of norms between gradient and unit natural gradient."""
    case, oracle = examination.case, examination.oracle
    if case.dtype != torch.float64 or "units" in case.options:
        return
    kept = ("labels", "weight_sharing", "damping", "batch_size", "class_axis")
    options = {k: v for k, v in case.options.items() if k in kept}
    table = called(
        examination,
        "gradient_gap",
        lambda: bs.gradient_gap(
            examination.model, *case.probe, likelihood=case.likelihood,
            layers=examination.only, **options, **case.extra,
        ),
    )  # fmt: skip
    if table is None:
        return
    gradients = oracle.gradients()
    for row in table.to_dict("records"):
        name = row["layer"]
        if name not in oracle.layers or name not in fishers:
            continue
        layer, fisher = oracle.layers[name], fishers[name]
        if fisher.sums is None or name not in examination.expected:
            continue
        from .oracle import by_unit

        g = by_unit(layer, gradients[layer.weight], gradients[layer.bias]).double()
        biased = oracle.biased[name]
        g[:, -1] *= biased
        updates, good = natural(examination.full[name], g, biased, case.options["damping"])
        used = ~(fisher.dead | fisher.singular | fisher.bias_inert)
        if not used.any() or not bool(good[used].all()) or row["units"] != int(used.sum()):
            continue
        p, n = g[used].flatten(), updates[used].flatten()
        if not (p.norm() > 1e-12 and n.norm() > 1e-12):
            continue
        expected = torch.stack([p @ n / (p.norm() * n.norm()), p.norm() / n.norm()])
        found = torch.tensor([row["cos_gradient"], row["norm_ratio"]])
        error = ((found - expected).abs() / (1e-3 + expected.abs())).max()
        examination.outcome.checks += 1
        if not error < 1e-5:
            examination.outcome.add(
                "WRONG", f"gap of '{name}': {found.tolist()} for {expected.tolist()}"
            )


def compare_step(examination: Any, fishers: dict[str, bs.UnitFisher]) -> None:
    """One step of the optimizer, with the errors of the data's labels, against the definition."""
    case, oracle = examination.case, examination.oracle
    model = case.build().model
    eligible = (
        case.dtype == torch.float64
        and len(case.x) > 1
        and case.class_axis == -1
        and not any(isinstance(m, RANDOM_IN_TRAINING) for m in model.modules())
        and not any(hasattr(m, "parametrizations") or m._backward_hooks for m in model.modules())
        and not examination.unfit
        and case.likelihood == "categorical"
        and case.face in ("plain", "batches")
        and case.mask is None
        and any(p.requires_grad for p in model.parameters())
    )
    if not eligible:
        return
    center, scale = ("q", "none")[case.seed % 2], ("full", "diagonal", "none")[case.seed % 5 % 3]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    try:
        optimizer = bs.optim.UnitNaturalGradient(
            model, lr=0.1, center=center, scale=scale, labels="empirical", decay=0.0, damping=0.01
        )
        out = model(case.x.detach().clone())
        loss = F.cross_entropy(out.movedim(-1, 1), case.y)
        optimizer.zero_grad()
        loss.backward()
        gradients = {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }
        optimizer.step()
    except (ValueError, RuntimeError) as refusal:
        examination.outcome.refusals.append(f"step: {str(refusal)[:160]}")
        return
    except Exception as error:
        examination.outcome.add("CRASHED", f"step: {type(error).__name__}: {error}")
        return
    expected = oracle.full_fishers("empirical")
    from .oracle import by_unit

    layers = {n: m for n, m in model.named_modules() if n in oracle.layers}
    rest = set(before)
    for name, layer in layers.items():
        weight, bias = (f"{name}.{key}" if name else key for key in ("weight", "bias"))
        rest -= {weight, bias}
        if gradients.get(weight) is None:
            continue
        trains = gradients.get(bias) is not None
        zeros = torch.zeros(len(expected[name]))
        g = by_unit(layer, gradients[weight], gradients[bias] if trains else zeros).double()
        updates, good = natural(expected[name], g, trains, 0.01, center, scale)
        moved = by_unit(
            layer,
            (before[weight] - layer.weight.detach()) / 0.1,
            (before[bias] - layer.bias.detach()) / 0.1 if trains else zeros,
        )
        if not good.any():
            continue
        error = (moved - updates)[good].abs().amax(1) / (1e-6 + updates[good].abs().amax(1))
        examination.outcome.checks += 1
        if not float(error.max()) < 1e-5:
            u = int(torch.arange(len(good))[good][error.argmax()])
            examination.outcome.add(
                "WRONG",
                f"step ({center}, {scale}) of '{name}', unit {u}: moved {moved[u].tolist()[:4]} "
                f"for {updates[u].tolist()[:4]}, gradient {g[u].tolist()[:4]}",
            )
    for name in rest:
        old, new = before[name], dict(model.named_parameters())[name].detach()
        change = 0.0 if gradients[name] is None else 0.1 * gradients[name]
        if not torch.allclose(old - change, new, rtol=1e-9, atol=1e-12):
            examination.outcome.add("WRONG", f"step: '{name}' did not take the plain gradient")


# -- training --------------------------------------------------------------------------------------


def compare_training(examination: Any) -> None:
    """Three steps of training, with and without a log: the same to the last bit."""
    case = examination.case
    if case.face not in ("plain", "batches"):
        return
    probe = (case.x.detach(), case.y) if case.seed % 8 == 0 else None

    def trained(measured: bool) -> list[Tensor] | None:
        model = case.build().model
        if not any(p.requires_grad for p in model.parameters()):
            return None
        model.train(len(case.x) > 1)
        if len(case.x) == 1 and probe is None:  # nothing to be seen in eval mode
            return None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        with repeatable(case.seed):
            log = None
            if measured:
                options = {} if probe is None else {
                    "probe": probe, "every": 2, "likelihood": case.likelihood,
                    **{k: v for k, v in case.options.items() if k in ("labels", "class_axis")},
                }  # fmt: skip
                if probe is not None:
                    options |= case.extra
                log = bs.instrument(model, optimizer=optimizer, layers=examination.only, **options)
            losses = []
            for _ in range(3):
                out = model(case.x.detach().clone()).movedim(case.class_axis, -1)
                loss = -log_likelihood(out, case.y, case.likelihood, case.mask) / len(case.x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            if log is not None:
                log.table()
                log.remove()
        return [*losses, *(p.detach() for p in model.parameters()), *model.buffers()]

    try:
        plain, again = trained(False), trained(False)
    except (RuntimeError, ValueError):  # cannot train as it is
        return
    # RReLU behind a checkpoint is not: PyTorch loses its slopes.
    if plain is None or again is None or not all(map(torch.equal, plain, again)):
        return
    results: list[Any] = []
    called(examination, "instrument", lambda: results.append(trained(True)))
    if results:
        examination.outcome.checks += 1
        same = [torch.equal(a, b) for a, b in zip(plain, results[0], strict=True)]
        if not all(same):
            diverged = all(bool(t.isfinite().all()) for t in plain if t.is_floating_point())
            if diverged:
                examination.outcome.add("DISTURBED", f"training with a log: {Counter(same)}")
