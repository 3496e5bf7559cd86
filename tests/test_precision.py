"""Under autocast nothing overflows, becomes zero, or loses more than the products' own digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ase.io import write
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import precision
from fairchem_equiformer.models import EnergyHead, EquiformerV2Hydra, ForceHead, StressHead
from tests import golden
from tests.conftest import make_data, write_lmdb
from tests.models import KEYS, gradients, random_loss, scatter_weights
from tests.structures import three_slabs
from tests.tape import tensors
from tests.tolerances import TOLERANCES, relative_error

OPTIONS = {
    "separable grid MLP": {},
    "gate": {"use_gate_act": True, "use_grid_mlp": False, "norm_type": "rms_norm_sh"},
    "S2": {"use_sep_s2_act": False, "use_grid_mlp": False, "norm_type": "layer_norm"},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
MODELS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def model_of(options):
    heads = {
        "energy": (EnergyHead, {}),
        "forces": (ForceHead, {}),
        "stress": (StressHead, {"decompose": True}),
        "edges": (StressHead, {"output_name": "edges", "edge_level_mlp": True, "extensive": True}),
    }
    return scatter_weights(EquiformerV2Hydra(KEYS | options, heads)).eval()


class HalfRange(TorchDispatchMode):
    """The largest number in half precision that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" not in func.overloadpacket.__name__ and "fill" not in str(func):
            for tensor in tensors(out):
                if tensor.dtype == torch.float16 and tensor.numel():
                    self.largest = max(self.largest, tensor.abs().amax().item())
        return out


@DTYPES
@MODELS
def test_results_in_few_digits(options, dtype):
    model = model_of(options)
    with torch.no_grad():
        exact = model(three_slabs())
        with torch.autocast("cpu", dtype):
            found = model(three_slabs())
    for name, value in exact.items():
        assert found[name].dtype == torch.float32, name  # and so was it summed up
        # Of the stress' trace little is left of what it is a sum of.
        assert relative_error(found[name], value) < 2 * TOLERANCES["outputs"][dtype], name
        assert not torch.equal(found[name], value), f"{name}: autocast did nothing"


@MODELS
def test_nothing_comes_near_the_end_of_float16(options):
    with torch.no_grad(), torch.autocast("cpu", torch.float16), HalfRange() as seen:
        model_of(options)(three_slabs())
    assert 0 < seen.largest < torch.finfo(torch.float16).max / 64


def scaled_gradients(model, dtype, scale):
    """Gradients under autocast, of a loss that is scaled for the backward pass alone."""
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = random_loss(model(three_slabs()))
    (scale * loss).backward()
    return {name: p.grad / scale for name, p in model.named_parameters()}


@DTYPES
@MODELS
def test_gradients_under_a_scaled_loss(options, dtype):
    """As GradScaler has them, which halves its scale until nothing overflows."""
    model = model_of(options)
    exact = {name: value.clone() for name, value in gradients(model, three_slabs()).items()}
    scale = 512.0
    found = scaled_gradients(model, dtype, scale)
    while not all(gradient.isfinite().all() for gradient in found.values()):
        scale /= 2
        assert scale >= 64
        found = scaled_gradients(model, dtype, scale)
    # An entry by itself may be the rest of what cancels; all of a parameter together are not.
    allowed = 0.2 if dtype == torch.bfloat16 else 0.05
    for name, expected in exact.items():
        error = (found[name] - expected).norm()
        assert error <= allowed * expected.norm(), (name, error / expected.norm())


# The benchmark


def test_tf32_keeps_ten_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = precision.tf32(x)
    assert ((rounded - x).abs() <= 2**-11 * x.abs()).all()
    assert (rounded != x).any()
    assert torch.equal(precision.tf32(rounded), rounded)
    mantissa, _ = torch.frexp(rounded)
    assert torch.equal(mantissa * 2**11, (mantissa * 2**11).round())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as the demo's."""
    folder = tmp_path_factory.mktemp("s2ef")
    for split, count in (("train", 4), ("val_id", 2)):
        (folder / split).mkdir()
        write_lmdb(folder / split / "data.0000.lmdb", [make_data(i) for i in range(count)])
    return ["--data", str(folder)]


def rows(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_orders_the_formats(data, tmp_path, capsys):
    weights = str(tmp_path / "weights.pt")
    precision.main(["train", "--model", "tiny", "--steps", "3", "--out", weights, *data])
    capsys.readouterr()
    precision.main(["table", weights, "--structures", "2", *data])
    found = {row[2]: [float(cell) for cell in row[3:]] for row in rows(capsys)}
    assert list(found) == ["fp32", "tf32, emulated", "bf16", "fp16"]
    relative = {name: errors[-1] for name, errors in found.items()}
    assert relative["fp32"] < 1e-5 < relative["tf32, emulated"] < relative["bf16"] < 0.05
    assert 1e-5 < relative["fp16"] < relative["bf16"]


def test_errors_of_a_checkpoint(tmp_path, capsys):
    structures = tmp_path / "structures.traj"
    write(structures, [golden.structure(name) for name in golden.names()[:3]])
    precision.main(["checkpoint", str(golden.checkpoint("hydra")), str(structures)])
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    relative = {(dtype, name.split(" / ")[0]): float(cells[-1]) for dtype, name, *cells in rows}
    assert len(relative) == 6
    for name in ("energy", "forces", "stress"):
        assert relative["float32", name] < 1e-5 < relative["bfloat16", name] < 0.05


def test_training_in_bfloat16_is_close_to_float32_and_not_it(data):
    folder, found = Path(data[1]), {}
    for dtype in ("fp32", "bf16"):
        steps = precision.trained("demo", 3, 0.005, folder, dtype=dtype, seed=0, size=2)
        found[dtype] = [error for _, error in steps]
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)


def test_curves(data, capsys):
    precision.main(["curves", "--steps", "3", "--every", "2", "--seeds", "1", *data])
    found = rows(capsys)
    assert [row[0] for row in found] == ["2", "3"]
    assert all(float(value) > 0 for row in found for value in row[1:])
