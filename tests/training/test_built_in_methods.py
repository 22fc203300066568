"""Methods that are built into the model that a recipe trains."""

import pytest
import torch
from methods_toy import Shift
from test_sft_recipe import _config, _losses, _train, _weights, folder  # noqa: F401

from mmlm.engine.build_in import built_in
from mmlm.errors import IncompatibleMethods, InputError
from mmlm.inputs import load_image, message, prepare
from mmlm.model.checkpoint import load
from training.__main__ import main
from training.model import choose_what_learns, load_for_training
from training.settings import ModelSettings
from training.stored import find_checkpoint

SHIFT = "methods_toy.Shift(at=0)"


def test_only_the_methods_weights_learn_and_are_stored(folder, tmp_path):  # noqa: F811
    output = _train(
        folder,
        tmp_path / "out",
        model__methods=[SHIFT],
        model__learns=["methods"],
        optimisation__epochs=4.0,
        optimisation__learning_rate=0.05,
    )
    losses = _losses(output)
    assert losses[-1] < losses[0]
    model, _ = load(str(output / "model"))
    assert built_in(model) == (Shift(at=0),)
    assert model.mmlm_methods["Shift"].vector.abs().min() > 0
    before, after = _weights(folder / "model"), _weights(output / "model")
    assert all(torch.equal(before[name], x) for name, x in after.items())


def test_methods_learn_beside_adapters(folder, tmp_path):  # noqa: F811
    output = _train(
        folder,
        tmp_path / "out",
        model__methods=[SHIFT],
        model__learns=["language", "methods"],
        model__lora={"r": 2, "alpha": 4},
        optimisation__learning_rate=0.05,
        export=["merged", "adapter"],
    )
    model, processor = load(str(output / "merged"))
    assert built_in(model) == (Shift(at=0),)
    assert model.mmlm_methods["Shift"].vector.abs().min() > 0
    inputs = prepare(
        processor, [[message("user", "what is it ?", 1)]], [[load_image(folder / "0.png")]]
    )
    adapted, _ = find_checkpoint(output / "adapter").load()
    with torch.no_grad():
        expected, found = model(**inputs).logits, adapted(**inputs).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        vector = adapted.base_model.model.mmlm_methods["Shift"]
        assert torch.equal(vector.original_module.vector, torch.zeros_like(vector.vector))
        with adapted.disable_adapter():  # as it was before
            assert not torch.allclose(adapted(**inputs).logits, expected, atol=1e-3)


def test_what_is_refused(folder, tmp_path, capsys):  # noqa: F811
    stored = _train(folder, tmp_path / "out", model__methods=[SHIFT], model__learns=["methods"])
    there = str(stored / "model")
    same, _ = load_for_training(ModelSettings(name=there, methods=(SHIFT,)))
    assert built_in(same) == (Shift(at=0),)
    with pytest.raises(IncompatibleMethods, match=r"Shift\(at=0\) is built into.*Shift\(at=1\)"):
        load_for_training(ModelSettings(name=there, methods=("methods_toy.Shift(at=1)",)))
    plain, _ = load_for_training(ModelSettings(name=str(folder / "model")))
    with pytest.raises(InputError, match="no methods with weights"):
        choose_what_learns(plain, ModelSettings(learns=("methods",)))
    assert main(["--config", _config(folder, tmp_path / "bad", model__methods=["Nope()"])]) == 2
    assert "no method 'Nope'" in capsys.readouterr().err
