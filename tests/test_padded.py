import pytest
import torch
from torch import nn

from sjepa_deploy.learning.padded import attend, decoder_layer, encoder_layer

EMBEDDINGS, HEADS = 64, 8


def padding_of(lengths, longest):
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


def gradients(layer, output, wanted):
    layer.zero_grad()
    output[wanted].square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("n_heads", [8, 4, 1])
def test_the_encoder_layer_is_pytorchs(n_heads):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBEDDINGS, n_heads, 96, dropout=0.0, batch_first=True).double()
    tokens, padding = torch.randn(3, 7, EMBEDDINGS).double(), padding_of([7, 4, 1], 7)
    expected, found = layer(tokens, src_key_padding_mask=padding), encoder_layer(layer, tokens, padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=0, atol=1e-13)
    assert found.isfinite().all()
    expected, found = gradients(layer, expected, ~padding), gradients(layer, found, ~padding)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-11, msg=name)


def test_the_decoder_layer_is_pytorchs():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(EMBEDDINGS, HEADS, 96, dropout=0.0, batch_first=True).double()
    queries, context = torch.randn(3, 5, EMBEDDINGS).double(), torch.randn(3, 7, EMBEDDINGS).double()
    padding, context_padding = padding_of([2, 5, 1], 5), padding_of([7, 4, 1], 7)
    expected = layer(queries, context, tgt_key_padding_mask=padding, memory_key_padding_mask=context_padding)
    found = decoder_layer(layer, queries, context, padding, context_padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=0, atol=1e-13)
    expected, found = gradients(layer, expected, ~padding), gradients(layer, found, ~padding)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_of_a_padded_token_gets_through(dtype):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(EMBEDDINGS, HEADS, batch_first=True).to(dtype).eval()
    tokens, padding = torch.randn(2, 6, EMBEDDINGS).to(dtype), padding_of([6, 3], 6)
    other = torch.where(padding[..., None], 50 * torch.randn(2, 6, EMBEDDINGS), tokens).to(dtype)
    with torch.no_grad():
        found, same = attend(attention, tokens, tokens, padding), attend(attention, other, other, padding)
    assert torch.equal(found[~padding], same[~padding])


def test_attention_drops_out_while_it_trains_only():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(EMBEDDINGS, HEADS, dropout=0.5, batch_first=True)
    tokens, padding = torch.randn(1, 6, EMBEDDINGS), padding_of([4], 6)
    with torch.no_grad():
        dropped = torch.stack([attend(attention, tokens, tokens, padding) for _ in range(2000)])
        attention.eval()
        kept = attend(attention, tokens, tokens, padding)
        assert torch.equal(kept, attend(attention, tokens, tokens, padding))
    spread = dropped.std(dim=0)
    assert (spread > 0).all()
    torch.testing.assert_close(dropped.mean(dim=0), kept, rtol=0, atol=float(6 * spread.max() / 2000**0.5))
