from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from lopt_fast import reference
from lopt_fast import spec as spec_module
from lopt_fast.architectures import small_fc_lopt
from lopt_fast.spec import FEATURE_SETS, Spec, SpecError

COLUMNS = {
    # name: columns before the eleven time columns with the default decays (3 momenta, 1 second moment, 3 factored)
    "default": 28,
    "grads_time_p": 2,
    "m": 5,
    "rms": 4,
    "m_rms": 2 + 3 + 1 + 3 + 1,
    "adafact": 2 + 5 * 3,
    "adafact_m_mul": 2 + 3 + 6 * 3,
}


def test_paper_configuration() -> None:
    spec = small_fc_lopt.spec()
    assert (spec.input_size, spec.theta_size) == (39, 197)
    assert spec.layer_sizes == ((39, 4), (4, 4), (4, 2))
    assert [c.group for c in spec.normalised_columns if c.index == 0] == list(spec.groups)
    kinds = [c.kind for c in spec.normalised_columns]
    assert (kinds.count("element"), kinds.count("row"), kinds.count("column")) == (16, 6, 6)


@pytest.mark.parametrize(("name", "columns"), COLUMNS.items())
def test_feature_sets(name: str, columns: int) -> None:
    assert len(Spec(feature_set=name).normalised_columns) == columns


def test_union_takes_a_second_moment_for_each_momentum() -> None:
    spec = Spec(feature_set="union", rms_decays=(0.9, 0.99, 0.999))
    assert len(spec.normalised_columns) == 28 + 2 * 2


def test_columns_of_the_ablations_are_in_the_order_of_the_default() -> None:
    order = [(c.group, c.index) for c in Spec().normalised_columns]
    for name in FEATURE_SETS:
        positions = [order.index((c.group, c.index)) for c in Spec(feature_set=name).normalised_columns]
        assert positions == sorted(positions)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("width", [2, 4, 32, 256])
def test_theta_fits(width: int, layers: int) -> None:
    spec = Spec(hidden_size=width, hidden_layers=layers)
    theta = small_fc_lopt.init_theta(spec, seed=3)
    spec.check_theta(theta)
    flat = reference.flatten_theta(spec, theta)
    assert flat.shape == (spec.theta_size,)
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"hidden_size": 1}, "hidden_size"),
        ({"hidden_size": 257}, "hidden_size"),
        ({"hidden_size": 4.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_layers": 0}, "hidden_layers"),
        ({"hidden_layers": 3}, "hidden_layers"),
        ({"hidden_layers": True}, "hidden_layers"),
        ({"hidden_layers": 1.0}, "hidden_layers"),
        ({"feature_set": "everything"}, "feature_set"),
        ({"momentum_decays": ()}, "momentum_decays"),
        ({"rms_decays": (1.0,)}, "rms_decays"),
        ({"adafactor_decays": (0.9, math.nan, 0.9)}, "adafactor_decays"),
        ({"step_mult": math.inf}, "step_mult"),
        ({"exp_mult": "0.1"}, "exp_mult"),
        ({"scale": "tensor"}, "scale"),
        ({"scale_epsilon": -1e-4}, "scale_epsilon"),
        ({"statistics": "stale"}, "statistics"),
        ({"rms_decays": (0.9, 0.99)}, "rms_decays"),
        ({"adafactor_decays": (0.9, 0.99)}, "adafactor_decays"),
        ({"width": 4}, "width"),
        ({"rms_decays": "abc"}, "rms_decays"),
        ({"rms_decays": 0.9}, "rms_decays"),
        ({"rms_decays": [10**400]}, "rms_decays"),
    ],
)
def test_bad_values_name_the_culprit(values: dict[str, object], culprit: str) -> None:
    with pytest.raises(SpecError, match=culprit):
        Spec.from_dict(values)


def test_round_trip_through_json() -> None:
    spec = Spec(
        hidden_size=32, hidden_layers=1, feature_set="m", momentum_decays=(0.5,), scale="parameter_rms"
    )
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specifications_are_values() -> None:
    assert len({Spec(), Spec(), Spec(hidden_size=8)}) == 2
    with pytest.raises(FrozenInstanceError):
        Spec().hidden_size = 8  # type: ignore[misc]


def test_check_theta_names_the_culprit() -> None:
    spec = Spec()
    theta = small_fc_lopt.init_theta(spec)
    with pytest.raises(SpecError, match=r"missing \['w1'\]"):
        spec.check_theta({k: v for k, v in theta.items() if k != "w1"})
    with pytest.raises(SpecError, match="unknown"):
        spec.check_theta({**theta, "w9": theta["w1"]})
    with pytest.raises(SpecError, match="'w1' has shape"):
        spec.check_theta({**theta, "w1": theta["w1"][:2]})


def test_initial_weights_are_truncated_and_repeatable() -> None:
    spec = Spec(hidden_size=64)
    theta = small_fc_lopt.init_theta(spec, seed=1)
    assert all(np.array_equal(theta[k], v) for k, v in small_fc_lopt.init_theta(spec, seed=1).items())
    assert not np.array_equal(theta["w0"], small_fc_lopt.init_theta(spec, seed=2)["w0"])
    bound = 2 / math.sqrt(spec.input_size)
    assert float(np.abs(theta["w0"]).max()) <= bound * (1 + 1e-6)
    # A standard normal truncated at 2 has standard deviation 0.880.
    assert abs(float(theta["w0"].std()) * math.sqrt(spec.input_size) - 0.88) <= 0.05


CONSTANTS = {
    "kRmsEpsilon": reference.RMS_EPSILON,
    "kSquareEpsilon": reference.SQUARE_EPSILON,
    "kRowMeanEpsilon": reference.ROW_MEAN_EPSILON,
    "kFactorFloor": reference.FACTOR_FLOOR,
    "kDiagonalEpsilon": reference.DIAGONAL_EPSILON,
    "kFactorEpsilon": reference.FACTOR_EPSILON,
    "kNormaliserEpsilon": reference.NORMALISER_EPSILON,
    "kLogEpsilon": reference.LOG_EPSILON,
    "kGradientBound": reference.GRADIENT_BOUND,
    "kLaggedClip": spec_module.LAGGED_CLIP,
    "kMomenta": len(Spec().momentum_decays),
    "kFactored": len(Spec().adafactor_decays),
    "kTimeColumns": len(spec_module.TIMESCALES),
}


@pytest.fixture(scope="module")
def constants_header(root: Path) -> str:
    return (root / "kernels/common/constants.h").read_text()


@pytest.mark.parametrize(("name", "value"), CONSTANTS.items())
def test_kernel_constants_are_those_of_the_reference(constants_header: str, name: str, value: float) -> None:
    found = re.findall(rf"constexpr \w+ {name} = ([^;]+);", constants_header)
    assert [float(x) for x in found] == [value]


def test_kernel_timescales_are_those_of_the_reference(constants_header: str) -> None:
    (found,) = re.findall(r"kTimescales\[kTimeColumns\] = \{([^}]+)\}", constants_header)
    assert tuple(float(x) for x in found.split(",")) == spec_module.TIMESCALES


def test_kernel_columns_are_those_of_the_specification(constants_header: str) -> None:
    (body,) = re.findall(r"enum Column \{([^}]+)\}", constants_header)
    indices = {k: int(v) for k, v in re.findall(r"(k\w+) = (\d+),", body)}
    groups = {
        "g": "kG", "p": "kP", "m": "kM", "rms": "kV", "m_rsqrt_rms": "kMRsqrtV", "rsqrt_rms": "kRsqrtV",
        "fac_g": "kFacG", "fac_row": "kRow", "fac_column": "kCol", "rsqrt_fac_row": "kRsqrtRow",
        "rsqrt_fac_column": "kRsqrtCol", "fac_m": "kFacM",
    }  # fmt: skip
    columns = Spec().normalised_columns
    for i, column in enumerate(columns):
        if column.index == 0:
            assert indices[groups[column.group]] == i
    assert indices["kNormalised"] == len(columns)
