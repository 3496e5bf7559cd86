"""``torch.compile`` and ``torch.export`` of the models, and the operations that they see."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from fairchem_equiformer.graph.batch import Batch
from fairchem_equiformer.models.dens import (
    DeNSBackbone,
    DeNSEnergyHead,
    DeNSForceHead,
    DeNSStressHead,
)
from fairchem_equiformer.models.equiformer_v1 import Equiformer
from fairchem_equiformer.models.equiformer_v2 import EquiformerV2
from fairchem_equiformer.models.heads import EnergyHead, ForceHead, StressHead
from fairchem_equiformer.models.hydra import EquiformerV2Hydra
from fairchem_equiformer.models.on_graph import OnGraph
from fairchem_equiformer.ops import library
from tests.tolerances import assert_all_close, assert_close

# What PyTorch's compilers say of themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "At pre-dispatch tracing",
        "The given buffer is not writable",
        r"`torch\.cpu\.amp\.autocast",
    )
]

KEYS = {
    "max_neighbors": 6,
    "max_radius": 6.0,
    "num_layers": 1,
    "sphere_channels": 16,
    "attn_hidden_channels": 16,
    "num_heads": 2,
    "attn_alpha_channels": 16,
    "attn_value_channels": 16,
    "ffn_hidden_channels": 16,
    "norm_type": "layer_norm_sh",
    "lmax_list": [2],
    "mmax_list": [1],
    "grid_resolution": 8,
    "edge_channels": 16,
    "use_grid_mlp": True,
    "alpha_drop": 0.2,
    "drop_path_rate": 0.2,
    "proj_drop": 0.2,
    "edges_per_chunk": 20,
}
NO_DROPOUT = {"alpha_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0}
OPTIONS = {
    "separable grid MLP": {},
    "gate": {"use_gate_act": True, "use_grid_mlp": False, "norm_type": "rms_norm_sh"},
    "S2": {"use_sep_s2_act": False, "use_grid_mlp": False, "norm_type": "layer_norm"},
    "separable S2": {"use_grid_mlp": False, "use_m_share_rad": True},
    "learned Gaussians": {
        "distance_function": "learnable_gaussian",
        "share_atom_edge_embedding": True,
        "use_sep_s2_act": False,
        "activation_checkpoint": True,
    },
    "PyTorch's kernels": {"sphere_channels": 12, "attn_hidden_channels": 8, "edge_channels": 8},
}
HEADS = {
    "energy and forces": {"energy": (EnergyHead, {}), "forces": (ForceHead, {})},
    "stress": {
        "energy": (EnergyHead, {}),
        "stress": (StressHead, {}),
        "parts": (StressHead, {"output_name": "stress_of", "decompose": True}),
    },
    "stress of edges": {
        "both": (StressHead, {"edge_level_mlp": True, "use_source_target_embedding": True}),
    },
}
DENS = {
    "energy": (DeNSEnergyHead, {}),
    "forces": (DeNSForceHead, {}),
    "stress": (DeNSStressHead, {"use_denoising": False}),
}

V1 = {
    "max_neighbors": 6,
    "num_layers": 2,
    "irreps_node_embedding": "8x0e+4x1e",
    "irreps_head": "4x0e+2x1e",
    "num_heads": 2,
    "irreps_mlp_mid": "8x0e+4x1e",
    "irreps_feature": "8x0e",
    "edge_channels": 8,
    "num_distance_basis": 8,
    "use_tag_embedding": False,
    "regress_forces": True,
    "alpha_drop": 0.0,
    "edges_per_chunk": 20,
}
V1_DROPOUT = {"alpha_drop": 0.2, "drop_path_rate": 0.2}
V1_OPTIONS = {
    "MLP attention": V1_DROPOUT,
    "dot product": V1_DROPOUT | {"attention": "dot_product"},
    "linear messages": V1_DROPOUT
    | {"nonlinear_message": False, "smooth_cutoff": True, "vector_outputs": ["moments"]},
}


def batch(structures: int, atoms: int) -> Batch:
    """Atoms at random, some of them within reach of none."""
    total = structures * atoms
    return Batch(
        pos=torch.rand(total, 3) * torch.tensor([6.0, 6.0, 14.0]),
        cell=torch.diag(torch.tensor([6.0, 6.0, 40.0])).repeat(structures, 1, 1),
        pbc=torch.tensor([True, True, False]).repeat(structures, 1),
        natoms=torch.full((structures,), atoms),
        atomic_numbers=torch.randint(1, 80, (total,)),
    )


def in_double(structures: int, atoms: int) -> Batch:
    """For Equiformer (V1), which a compiler sees in PyTorch's operations."""
    data = batch(structures, atoms)
    return replace(data, pos=data.pos.double(), cell=data.cell.double())


def v1(**changes) -> Equiformer:
    return Equiformer(**{**V1, "num_layers": 1, **changes}).double()


def flat(**changes) -> EquiformerV2:
    return EquiformerV2(**{**KEYS, **changes})


def step(function, model, autocast=None) -> tuple[dict, dict]:
    """Results, and gradients of their squares."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        out = function()
    sum(value.float().square().sum() for value in out.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in out.items()}, gradients


def assert_near(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Sums of gradients may be made in another order."""
    (results, gradients), (wanted, wanted_gradients) = found, expected
    assert_equal(results, wanted)
    assert_all_close(gradients, wanted_gradients, "gradients")


def assert_same_numbers(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Of Equiformer (V1) in float64."""
    for tensors, wanted in zip(found, expected, strict=True):
        assert_all_close(tensors, wanted, "formula")


def assert_equal(results: dict, wanted: dict) -> None:
    """To the bit; a stress to rounding, whose edges a compiler sees all at once."""
    assert results.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("stress"):
            assert_close(results[name], value, "outputs", name=name)
        else:
            assert torch.equal(results[name], value), name


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """Remembers the arguments of the first call of each of this package's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[torch._ops.OpOverload, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == library.NAMESPACE:
            self.first.setdefault(func, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    """Of every operation, by models that take the way of a compiler without one."""
    found = Calls()
    for model in (
        flat(),
        flat(**OPTIONS["gate"]),
        flat(**OPTIONS["separable S2"]),
        EquiformerV2Hydra(KEYS, HEADS["stress"]),
        Equiformer(**V1),
    ):
        data = batch(1, 7)
        expected = step(lambda model=model, data=data: model(data), model)
        on_graph = OnGraph(model)
        with monkeypatch.context() as patch, found:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            inputs = on_graph.inputs(data)
            out = step(lambda function=on_graph, inputs=inputs: function(**inputs), model)
        if isinstance(model, Equiformer):  # without its compiled kernels
            assert_all_close(out[0], expected[0], "outputs")
            assert_all_close(out[1], expected[1], "gradients")
        else:
            assert_near(out, expected)
    return found.first


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def test_what_pytorch_asks_of_an_operation(calls):
    assert {operation._opname for operation in calls} == library.NAMES
    for operation, args in calls.items():
        checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if operation._opname + "_backward" in library.NAMES:
            args = tree_map_only(torch.Tensor, leaf, args)  # noqa: PLW2901
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operation, args, test_utils=checks)


def test_what_has_no_gradient_says_so():
    vector = torch.randn(3, 3, requires_grad=True)
    rotations = torch.ops.fairchem_equiformer.edge_rotations(vector, [2, 1, 0], torch.float32)
    with pytest.raises(NotImplementedError, match="edge_rotations has no gradient"):
        rotations.sum().backward()


def train(
    model,
    backend="aot_eager",
    autocast=None,
    make=batch,
    dynamic=None,
    check=assert_near,
    sizes=((1, 9), (2, 6)),
) -> None:
    """A compiled graph's break is an error. Sizes are structures and atoms of each batch."""
    function = torch.compile(OnGraph(model), backend=backend, fullgraph=True, dynamic=dynamic)
    for size in sizes:
        data = make(*size)
        inputs = OnGraph(model).inputs(data)
        assert len(inputs["chunks"]) > 1
        found = step(lambda inputs=inputs: function(**inputs), model, autocast)
        check(found, step(lambda data=data: model(data), model, autocast))


def test_a_compiled_training_step():
    train(flat())


def test_a_compiled_training_step_of_equiformer_v1():
    """By Dynamo alone, which is what could not follow its layers."""
    model = v1(**V1_DROPOUT, regress_forces=False)
    train(model, "eager", make=in_double, check=assert_same_numbers, sizes=[(2, 6)])


@pytest.mark.long
@pytest.mark.parametrize("options", V1_OPTIONS.values(), ids=V1_OPTIONS.keys())
def test_compiled_training_steps_of_equiformer_v1(options):
    train(v1(**options), make=in_double, check=assert_same_numbers)


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compiled_training_steps(options):
    train(flat(**options))


@pytest.mark.long
def test_a_compiled_training_step_of_any_sizes():
    train(flat(), dynamic=True)


def assert_rounded_alike(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert_all_close(found[0], expected[0], "outputs")
    assert_all_close(found[1], expected[1], "gradients")


INDUCTOR = {
    "EquiformerV2": (lambda: flat(**NO_DROPOUT), batch, assert_rounded_alike),
    "Equiformer (V1)": (v1, in_double, assert_same_numbers),
}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(("made", "make", "check"), INDUCTOR.values(), ids=INDUCTOR.keys())
def test_compiled_by_inductor(made, make, check):
    """Without dropout, for which it draws other numbers: training steps, and a prediction."""
    model = made()
    function = torch.compile(OnGraph(model), backend="inductor", fullgraph=True)
    for data in (make(1, 9), make(2, 6)):
        inputs = OnGraph(model).inputs(data)
        found = step(lambda inputs=inputs: function(**inputs), model)
        check(found, step(lambda data=data: model(data), model))
    model.eval()
    with torch.no_grad():
        check((function(**inputs), {}), (model(data), {}))


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compiled_training_steps_in_bfloat16(options):
    """Not by AOTAutograd, which rounds between a product and its bias."""
    recomputed = options.get("activation_checkpoint", False)
    without = NO_DROPOUT if recomputed and not draws_the_same_again() else {}
    train(flat(**options, **without), "eager", torch.bfloat16)


def draws_the_same_again() -> bool:
    """Whether Dynamo alone gives a checkpoint that is computed again the dropout of the first time.

    torch 2.13 does not, whose gradients are then those of another function; torch 2.4 does, and so
    does AOTAutograd with either.
    """

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: F.dropout(x * x), x, use_reentrant=False)

    x = torch.ones(64, requires_grad=True)
    out = torch.compile(dropped, backend="eager", fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    return torch.equal(gradient != 0, out != 0)


@pytest.mark.long
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_heads_by_name(heads):
    train(EquiformerV2Hydra(KEYS, heads))


def denoising() -> EquiformerV2Hydra:
    return EquiformerV2Hydra(KEYS | {"use_noise_schedule_sigma_encoding": True}, DENS, DeNSBackbone)


def clean(structures: int, atoms: int) -> Batch:
    return batch(structures, atoms)


def noisy(structures: int, atoms: int) -> SimpleNamespace:
    """As fairchem's trainer gives it where all atoms are noisy."""
    data = SimpleNamespace(**vars(batch(structures, atoms)), denoising_pos_forward=True)
    data.forces, data.sigmas = torch.randn_like(data.pos), torch.rand(len(data.pos), 1)
    return data


def partly_noisy(structures: int, atoms: int) -> SimpleNamespace:
    data = noisy(structures, atoms)
    data.noise_mask = torch.arange(len(data.pos)) % 3 > 0
    return data


@pytest.mark.long
@pytest.mark.parametrize("make", [clean, noisy, partly_noisy])
def test_steps_of_dens(make):
    train(denoising(), make=make)


def test_a_noisy_step_needs_forces():
    data = noisy(1, 4)
    del data.forces
    with pytest.raises(ValueError, match="noisy, but has no field 'forces'"):
        OnGraph(denoising()).inputs(data)


def exported(model, make, file, check=assert_equal, *kind) -> None:
    """Exported with any sizes, saved, read again, run on others."""
    on_graph = OnGraph(model.eval())
    with torch.no_grad():
        torch.export.save(on_graph.exported(make(2, 6)), file)
        program = torch.export.load(file).module()
        for data in (make(1, 9), make(3, 5)):
            check(program(**on_graph.inputs(data)), model(data), *kind)


def test_an_exported_model(tmp_path):
    exported(flat(), batch, tmp_path / "model.pt2")


@pytest.mark.long
@pytest.mark.parametrize("attention", ["mlp", "dot_product"])
def test_an_exported_equiformer_v1(attention, tmp_path):
    model = Equiformer(**V1, attention=attention)
    exported(model, batch, tmp_path / "model.pt2", assert_all_close, "outputs")


def test_derivatives_of_equiformer_v1_are_refused():
    on_graph = OnGraph(Equiformer(**V1 | {"direct_forces": False}))
    with pytest.raises(ValueError, match="direct_forces must be True"):
        on_graph.exported(batch(2, 6))


@pytest.mark.long
def test_an_exported_model_of_stresses(tmp_path):
    exported(EquiformerV2Hydra(KEYS, HEADS["stress"]), batch, tmp_path / "model.pt2")


@pytest.mark.long
@pytest.mark.parametrize("make", [clean, noisy, partly_noisy])
def test_an_exported_model_with_dens(make, tmp_path):
    exported(denoising(), make, tmp_path / "model.pt2")
