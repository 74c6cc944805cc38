"""The plain decoder as one native call against torch's layers, and a row's own bits in any company."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from duomo import kernels
from duomo.kernels import DenseForm, DenseWeight
from duomo.kernels.reference import linear, panel_linear
from duomo.model import Ernie
from duomo.model.decoder import Decoder
from duomo.model.ernie import init_weights
from duomo.model.plain_decoder import PlainDecoder, fuse, is_bfloat16
from tests.kernels.test_decoder import CONFIG, both, filled_cache, isa, step

native = pytest.importorskip("duomo._native", reason="the native module is not built")
pytestmark = pytest.mark.skipif(not kernels.is_native, reason="the native kernels are switched off")
__all__ = ["isa"]


def plain_model(form: DenseForm = DenseForm.BORROWED, **changes) -> Ernie:
    config = replace(CONFIG, vocab_size=100400, initializer_range=0.2, **changes)
    with torch.device("meta"):
        model = Ernie(config)
    model = init_weights(model.to_empty(device="cpu"), seed=2).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    if form is not DenseForm.BORROWED:
        model.bfloat16().float()
        assert is_bfloat16(model)
    fuse(model, form)
    return model


@pytest.fixture(scope="module", params=list(DenseForm))
def model(request) -> Ernie:
    return plain_model(request.param)


def native_step(model, batch, hidden):
    with torch.inference_mode():
        assert model.decoder._fused_for(hidden) is not None
        return model.decoder(hidden, batch, filled_cache("float32"))


def close(one, other, atol=1e-5):
    return torch.allclose(one, other, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("lengths", [[(13, 1)], [(5, 1), (0, 1), (30, 1)], [(7, 11), (33, 3), (2, 1)]])
@pytest.mark.parametrize("vision", ["none", "some", "all"])
@pytest.mark.parametrize("has_bias,form", [(False, 0), (True, 0), (False, 1), (True, 1)])
def test_one_call_gives_the_numbers_of_the_layers(isa, lengths, vision, has_bias, form):
    model = plain_model(DenseForm(form), use_bias=has_bias)
    assert isinstance(model.decoder, PlainDecoder)
    tokens = sum(new for _, new in lengths)
    is_vision = torch.arange(tokens) % 3 == 1 if vision == "some" else torch.full((tokens,), vision == "all")
    fused, plain = both(model, step(lengths, is_vision), "float32")
    assert close(fused[0], plain[0]) and close(fused[1], plain[1]) and torch.equal(fused[3], plain[3])


def test_wanted_rows_have_the_bits_that_they_have_among_all(isa, model):
    whole = step([(7, 11), (33, 3), (2, 2)], torch.arange(16) % 3 == 1)
    hidden = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([1, 10, 15])
    found = native_step(model, replace(whole, expert_ids_LTK=None, logit_rows=rows), hidden)
    assert torch.equal(found, native_step(model, whole, hidden)[rows])


def test_a_token_has_its_own_bits_in_any_company(isa, model):
    lengths = [(5, 1), (0, 1), (30, 1), (12, 1)]
    whole = step(lengths, torch.tensor([False, True, False, True]))
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    together = native_step(model, whole, hidden)
    for i in range(4):
        is_vision = torch.tensor([i % 2 == 1])
        alone = replace(
            step([lengths[i]], is_vision),
            slots_T=whole.slots_T[i : i + 1],
            page_table_SM=whole.page_table_SM[i : i + 1],
            expert_ids_LTK=None,
        )
        assert torch.equal(native_step(model, alone, hidden[i : i + 1])[0], together[i])


@pytest.mark.parametrize("rows,columns", [(1, 16), (5, 7), (64, 48), (77, 200), (130, 192)])
def test_a_product_is_torchs_and_a_row_depends_on_itself_alone(isa, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(71, columns, generator=generator)
    with torch.inference_mode():
        whole = kernels.dense_linear(x, weight)
        assert torch.allclose(whole, linear(x, weight), rtol=1e-5, atol=1e-4)
        for count in (1, 2, 3, 4, 6, 7, 33, 70):
            assert torch.equal(kernels.dense_linear(x[:count], weight), whole[:count])
            assert torch.equal(kernels.dense_linear(x[71 - count :], weight), whole[71 - count :])


@pytest.mark.parametrize("form", [DenseForm.PANELS, DenseForm.ROUNDED])
@pytest.mark.parametrize("rows,columns", [(1, 16), (5, 7), (64, 48), (77, 201), (130, 192)])
def test_panels_have_the_bits_of_their_reference(isa, rows, columns, form):
    generator = torch.Generator().manual_seed(rows)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, columns), (rows,)))
    x = torch.randn(41, columns, generator=generator)
    own = DenseWeight(weight, bias, form)
    with torch.inference_mode():
        whole = kernels.dense_linear(x, own)
        assert torch.equal(whole, panel_linear(x, weight, bias, form is DenseForm.ROUNDED))
        assert torch.allclose(whole, linear(x, weight, bias), rtol=0, atol=0.02 * columns**0.5)
        for count in (1, 2, 3, 4, 6, 7, 33, 40):
            assert torch.equal(kernels.dense_linear(x[:count], own), whole[:count])
            assert torch.equal(kernels.dense_linear(x[41 - count :], own), whole[41 - count :])


@pytest.mark.parametrize("form", list(DenseForm))
def test_every_instruction_set_gives_the_same_bits(form):
    weight, x = torch.randn(77, 200), torch.randn(7, 200)
    results = []
    with torch.inference_mode():
        for name in ("portable", "avx2", "avx512"):
            native.set_isa(name)
            results.append(kernels.dense_linear(x, DenseWeight(weight, form=form)))
    native.set_isa("")
    assert all(torch.equal(results[0], other) for other in results)


def test_new_weights_are_seen():
    """Written in place, put in another's place, or moved; never much larger, which would spread rounding."""
    model = plain_model()
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    batch = step([(4, 3)], torch.zeros(3, dtype=torch.bool))
    before = native_step(model, batch, hidden)
    q = model.decoder.layers[1].attention.q
    for change in (
        lambda: q.weight.data.mul_(-1.5),
        lambda: setattr(q, "weight", torch.nn.Parameter(q.weight * 0.5, requires_grad=False)),
        lambda: setattr(q.weight, "data", q.weight.data * -1.2),
        lambda: model.load_state_dict({name: x * 0.9 for name, x in model.state_dict().items()}),
    ):
        change()
        after = native_step(model, batch, hidden)
        with torch.inference_mode():
            plain = Decoder.forward(model.decoder, hidden, batch, filled_cache("float32"))
        assert close(after, plain) and not close(after, before)
        before = after


def test_another_module_or_gradients_or_bf16_are_torchs():
    model = plain_model()
    hidden = torch.randn(3, 64)
    assert model.decoder._fused_for(hidden) is None, "gradients are enabled"
    with torch.inference_mode():
        assert model.decoder._fused_for(hidden.bfloat16()) is None
        assert model.decoder._fused_for(hidden) is not None
        layer = model.decoder.layers[1]
        own, layer.mlp.shared = layer.mlp.shared, torch.nn.Identity()
        assert model.decoder._fused_for(hidden) is None
        layer.mlp.shared = own
        assert model.decoder._fused_for(hidden) is not None
        model.bfloat16()
        assert model.decoder._fused_for(hidden) is None


def test_a_head_in_panels_gives_the_same_logits_and_copies_make_their_own():
    model = plain_model(DenseForm.PANELS)
    assert model.embed.panels is not None
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = model.unembed(hidden)
        assert torch.equal(logits, panel_linear(hidden, model.embed.weight))
        assert torch.equal(deepcopy(model).unembed(hidden), logits)
    assert torch.allclose(model.unembed(hidden), logits, atol=1e-4), "with gradients it is torch's"


def test_weights_beyond_bf16_are_told():
    model = plain_model()
    assert not is_bfloat16(model)
    model.bfloat16().float()
    assert is_bfloat16(model)
    with torch.no_grad():
        model.decoder.layers[1].attention.q.weight[0, 0] = 1 + 2.0**-12
    assert not is_bfloat16(model)
