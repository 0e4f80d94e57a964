"""Training checkpoints of torch, as timm's and IBM's training scripts write them.

torch's state of an optimiser has no names: parameters are counted through its groups, in the order in which the model
has them. That order is the order of the state dict in the same file.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import architecture
from convert.errors import ConversionError, listed, one_line
from convert.files import replacing, write_bytes
from convert.formats.torch_files import load_plain
from convert.tensors import as_array, as_tensor
from convert.training.state import MOMENTS, Rule, TrainingState, decay_groups
from convert.tree import from_state_dict, shapes_of
from convert.weights import Weights
from crossvit_jax.config import TIMM_NAMES, Branch, CrossViTConfig

_BETAS, _EPS = (0.9, 0.999), 1e-8  # those of the trainer
_MODEL, _AVERAGE = ("state_dict", "model"), ("state_dict_ema", "model_ema")
# what a group of parameters may say without another step being computed
_HARMLESS = {"params", "param_names", "lr", "initial_lr", "lr_scale", "weight_decay", "foreach", "capturable"}
_HARMLESS |= {"differentiable", "fused"}
_OWN = {"adamw": {"betas", "eps", "amsgrad", "decoupled_weight_decay"}, "sgd": {"momentum", "dampening", "nesterov"}}


def read_torch_checkpoint(path: Path, branches: Sequence[Branch] | None = None) -> TrainingState:
    """The training state in a checkpoint of timm's or IBM's training script; nothing in it is run.

    Args:
        branches: of a model that is no variant.

    Raises:
        ConversionError: there is no training state in it, it is damaged, or its optimiser computes other steps than
            the trainer here could go on with.
    """
    held = load_plain(path)
    model = next((key for key in _MODEL if isinstance(held, Mapping) and isinstance(held.get(key), Mapping)), None)
    if model is None or not isinstance(held.get("optimizer"), Mapping):
        raise ConversionError(
            f"{path} is no training checkpoint: --resume needs a model and its optimizer; --init takes weights alone"
        )
    try:
        return _understand(held, model, branches)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ConversionError(f"{path}: its optimizer is damaged: {type(error).__name__}: {one_line(error)}") from None


def _understand(held: Mapping[str, Any], model: str, branches: Sequence[Branch] | None) -> TrainingState:
    tensors = from_state_dict(held[model])
    shapes = shapes_of(tensors)
    config = architecture.infer_config(shapes, None, branches)
    architecture.check(shapes, config, model)
    groups = held["optimizer"]["param_groups"]
    optimizer = _optimizer(groups, held.get("args"))
    names, decay_tokens = _names(groups, shapes)
    moments, updates = _moments(held["optimizer"]["state"], names, shapes, optimizer)
    if "epoch" not in held:
        raise ConversionError("it does not tell its epoch")
    average = next((from_state_dict(held[key]) for key in _AVERAGE if isinstance(held.get(key), Mapping)), None)
    if average is not None:
        architecture.check(shapes_of(average), config, "the average of the weights")
    rule = Rule(
        optimizer=optimizer,
        lr=float(_same(groups, "lr")),
        peak_lr=float(_same(groups, "initial_lr")) if "initial_lr" in groups[0] else None,
        weight_decay=float(groups[-1]["weight_decay"]),
        momentum=float(_same(groups, "momentum")) if optimizer == "sgd" else None,
        decay_tokens=decay_tokens,
    )
    # timm's files before version 2 tell the epoch that comes next
    epochs = int(held["epoch"]) + (model == "model" or held.get("version", 0) > 1)
    scaler = next((key for key in ("amp_scaler", "scaler") if held.get(key)), None)
    notes = (f"the state of its GradScaler ({scaler}) is left out: nothing here scales gradients",) if scaler else ()
    return TrainingState(
        weights=Weights(config=config, tensors=tensors),
        average=average,
        moments=moments,
        updates=updates,
        epochs=epochs,
        rule=rule,
        notes=notes,
    )


def _optimizer(groups: Sequence[Mapping[str, Any]], args: Any) -> str:
    """`adamw` or `sgd`. Raises ConversionError for any other, and for options that make other steps."""
    first = groups[0]
    kind = "adamw" if {"betas", "eps", "amsgrad"} <= set(first) else "sgd" if "nesterov" in first else None
    if kind is None:
        raise ConversionError(f"its optimizer is neither AdamW nor SGD: it has {', '.join(_told(first))}")
    for group in groups:
        odd = [f"{key} {group[key]}" for key in sorted(set(group) - _HARMLESS - _OWN[kind]) if group[key]]
        odd += [f"amsgrad {group['amsgrad']}"] if group.get("amsgrad") else []
        if kind == "adamw":
            odd += [f"betas {tuple(group['betas'])}, not {_BETAS}"] if tuple(group["betas"]) != _BETAS else []
            odd += [f"eps {group['eps']}, not {_EPS}"] if group["eps"] != _EPS else []
        else:
            odd += [f"dampening {group['dampening']}"] if group["dampening"] else []
            odd += ["no nesterov"] if group["momentum"] and not group["nesterov"] else []
        if odd:
            raise ConversionError(f"its {kind} makes other steps than the one here: {'; '.join(odd)}")
    if kind == "adamw" and any(group["weight_decay"] for group in groups):
        if first.get("decoupled_weight_decay") is False:
            raise ConversionError("its optimizer is Adam with weight decay in the gradient (L2), not AdamW")
        named = getattr(args, "opt", None)
        if "decoupled_weight_decay" not in first and named != "adamw":
            raise ConversionError(
                f"its optimizer is Adam or AdamW: decoupled_weight_decay is not in its groups, and args.opt is {named}"
            )
    return kind


def _told(group: Mapping[str, Any]) -> list[str]:
    return [str(key) for key in group if key not in _HARMLESS]


def _same(groups: Sequence[Mapping[str, Any]], key: str) -> Any:
    values = {group[key] for group in groups}
    if len(values) > 1:
        raise ConversionError(f"its groups of parameters have {key} {' and '.join(map(str, sorted(values)))}")
    return values.pop()


def _names(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict, bool | None]:
    """The parameter behind each index, and whether tokens decay (None: nothing does)."""
    if any(group.get("lr_scale", 1) != 1 for group in groups):
        raise ConversionError("it was trained with timm's layer-wise learning rates, whose layers are others than here")
    decays = [group["weight_decay"] for group in groups]
    sizes = [len(group["params"]) for group in groups]
    timm, ibm = (decay_groups(shapes, decay_tokens=tokens) for tokens in (False, True))
    known = [(None, ([*shapes],)), (False, timm), (True, ibm)]
    found = [(tokens, layout) for tokens, layout in known if sizes == [len(names) for names in layout]]
    if not found:
        asked = " or ".join(" + ".join(str(len(names)) for names in layout) for _, layout in known)
        had = " + ".join(map(str, sizes))
        raise ConversionError(f"its optimizer has {had} parameters in its groups; timm and IBM have {asked} of them")
    tokens, layout = found[0]
    if decays[0]:
        raise ConversionError(f"its optimizer lets biases and norms decay by {decays[0]}, which is not done here")
    pairs = [
        pair for group, names in zip(groups, layout, strict=True) for pair in zip(group["params"], names, strict=True)
    ]
    return dict(pairs), tokens


def _moments(
    state: Mapping[int, Mapping[str, Any]], names: Mapping[int, str], shapes: Mapping[str, tuple], optimizer: str
) -> tuple[dict[str, dict[str, np.ndarray]], int | None]:
    """The moments of the parameters that have any, by name; and how often they were updated."""
    wanted = MOMENTS[optimizer]
    moments: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in wanted}
    steps: dict[str, int] = {}
    for index, entry in state.items():
        name = names[index]
        unknown = [key for key, value in entry.items() if key not in (*wanted, "step") and value is not None]
        if unknown:
            raise ConversionError(f"its optimizer keeps {', '.join(unknown)} of {name}: it is no {optimizer}")
        for moment in wanted:
            if entry.get(moment) is not None:
                moments[moment][name] = as_array(entry[moment], f"{moment} of {name}")
        if "step" in entry:
            steps[name] = int(entry["step"])
    wrong = [
        f"{moment} of {name} {array.shape} instead of {shapes[name]}"
        for moment, arrays in moments.items()
        for name, array in arrays.items()
        if array.shape != shapes[name]
    ]
    if wrong:
        raise ConversionError(f"the state of its optimizer does not fit the model: {listed(wrong[:3], len(wrong))}")
    broken = [
        f"{moment} of {name}"
        for moment, arrays in moments.items()
        for name, array in arrays.items()
        if not np.isfinite(array.astype(np.float32)).all()
    ]
    if broken:
        raise ConversionError(f"the state of its optimizer has NaN or infinity: {listed(broken[:3], len(broken))}")
    counted = Counter(steps.values()).most_common()
    if len(counted) > 1:
        usual = counted[0][0]
        others = [f"{name} {count}" for name, count in steps.items() if count != usual]
        raise ConversionError(
            f"its parameters were updated unequally often, most {usual} times, but {listed(others[:3], len(others))}: "
            "one count is kept here for all"
        )
    return moments, counted[0][0] if counted else None


# --- writing ---


def write_torch_checkpoint(state: TrainingState, path: Path) -> None:
    """Writes what timm's `resume_checkpoint` and `train.py --resume` go on with. Raises NotWritten.

    Names, order and groups of the parameters are timm's. Tensors keep their dtypes.
    """
    import torch

    config = state.weights.config
    tensors = _in_order(state.weights.tensors, config)
    held = {
        "epoch": state.epochs - 1,
        "arch": TIMM_NAMES.get(config.name, config.name),
        "state_dict": _as_tensors(tensors),
        "optimizer": _optimizer_state(state, shapes_of(tensors)),
        "version": 2,
    }
    if state.average is not None:
        held["state_dict_ema"] = _as_tensors(_in_order(state.average, config))
    buffer = io.BytesIO()
    torch.save(held, buffer)
    with replacing(path) as new:
        write_bytes(new, buffer.getbuffer())


def _in_order(tensors: Mapping[str, np.ndarray], config: CrossViTConfig) -> dict[str, np.ndarray]:
    """The tensors in the order of the parameters of timm's model, which is that of the torch twin."""
    import crossvit_torch

    model = crossvit_torch.CrossViT(config, device="meta")
    return {name: tensors[name] for name, _ in model.named_parameters()}


def _as_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: as_tensor(np.ascontiguousarray(array)) for name, array in tensors.items()}


def _optimizer_state(state: TrainingState, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    import torch

    rule = state.rule
    unused = [torch.nn.Parameter(torch.zeros(()))]
    if rule.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(unused, lr=rule.lr, betas=_BETAS, eps=_EPS)
    else:
        optimizer = torch.optim.SGD(unused, lr=rule.lr, momentum=rule.momentum, nesterov=bool(rule.momentum))
    usual = optimizer.state_dict()["param_groups"][0]  # with all that this torch keeps
    # timm makes one group where nothing decays
    layout = decay_groups(shapes, decay_tokens=False) if rule.weight_decay else ([*shapes],)
    groups, names = [], []
    for place, members in enumerate(layout):
        params = [*range(len(names), len(names) + len(members))]
        own = {"lr": rule.lr, "weight_decay": rule.weight_decay if place else 0.0, "params": params}
        groups.append({**usual, **own} | ({} if rule.peak_lr is None else {"initial_lr": rule.peak_lr}))
        names += members
    entries = {}
    for index, name in enumerate(names):
        held = {moment: arrays[name] for moment, arrays in state.moments.items() if name in arrays}
        if held:
            count = {} if state.updates is None else {"step": torch.tensor(float(state.updates), dtype=torch.float32)}
            entries[index] = count | _as_tensors(held)
    return {"state": entries, "param_groups": groups}
