"""Networks: any leading batch dimensions, any image sizes, several inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.networks.mlp import MLP, flatten_inputs

# Convolutions over another batch may be summed in another order: a few roundings.
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}


def looped(network: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([network(row) for row in particle]) for particle in x])


@pytest.mark.parametrize(
    "network",
    [
        lambda: MLP([(1, 8, 8)], 10, (16,)),
        lambda: MLP([(1, 8, 8)], 10, (16,), batch_norm=True).eval(),
        lambda: ConvEncoder((1, 8, 8), 10, channels=2, hidden=8),
        lambda: ConvDecoder([(1, 8, 8)], (2, 16, 16), channels=2, hidden=8),
    ],
)
def test_batches_equal_single_inputs(network: object) -> None:
    with torch.no_grad():
        net = network()  # type: ignore[operator]
        x = torch.randn(3, 5, 1, 8, 8)
        expected = looped(net, x)
        torch.testing.assert_close(net(x), expected, **ROUNDING)
        torch.testing.assert_close(net(x[0]), expected[0], **ROUNDING)
        torch.testing.assert_close(net(x.unsqueeze(1)), expected.unsqueeze(1), **ROUNDING)


def test_several_inputs_broadcast() -> None:
    with torch.no_grad():
        y, z = torch.randn(5, 1, 7, 7), torch.randn(3, 5, 4)
        for net in (MLP([(1, 7, 7), (4,)], 6, (8,)), ConvDecoder([(1, 7, 7), (4,)], (1, 14, 14), 2, 8)):
            out = net(y, z)
            assert out.shape[:2] == (3, 5)
            for k in range(3):
                torch.testing.assert_close(out[k], net(y, z[k]), **ROUNDING)


def test_flatten_inputs_keeps_the_order() -> None:
    y, z = torch.arange(4.0).reshape(1, 2, 2), torch.tensor([9.0])
    assert flatten_inputs([y, z], [(1, 2, 2), (1,)]).tolist() == [0, 1, 2, 3, 9]
    with pytest.raises(ValueError, match="the network takes 2 inputs"):
        flatten_inputs([y], [(1, 2, 2), (1,)])
    with pytest.raises(ValueError, match=r"an input has shape \(1, 2, 2\); its last dimensions must be \(1, 4\)"):
        flatten_inputs([y], [(1, 4)])


def test_batch_normalised_layers_are_standardised_over_all_rows() -> None:
    net, x = MLP([(4,)], 2, (6,), activation=lambda h: h, batch_norm=True), 5 * torch.randn(3, 7, 4) + 2
    kept: list[Tensor] = []
    net.layers[1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    out = net(x)
    rows = kept[0].reshape(-1, 6)
    torch.testing.assert_close(rows.mean(0), torch.zeros(6), **ROUNDING)
    # The variance has torch's 1e-5 added before it divides; those of affine maps of x are far above it.
    assert torch.allclose(rows.var(0, correction=0), torch.ones(6), atol=1e-4)
    torch.testing.assert_close(out.reshape(-1, 2), net(x.reshape(-1, 4)), **ROUNDING)


def test_one_row_is_normalised_by_the_running_averages() -> None:
    net, rows = MLP([(4,)], 2, (6,), batch_norm=True), torch.randn(9, 4)
    net(rows)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one = net(rows[:1])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(one, net.eval()(rows)[:1], **ROUNDING)


def test_no_hidden_layer_makes_an_affine_map() -> None:
    net = MLP([(3,)], 2, hidden=())
    a, b = torch.randn(2, 5, 3)
    # Affine maps take midpoints to midpoints.
    torch.testing.assert_close(net((a + b) / 2), (net(a) + net(b)) / 2)
    assert net(torch.zeros(3)).tolist() == net.layers[0].bias.tolist()


SIZES = [(28, 28), (28, 20), (17, 17), (16, 19), (18, 18), (32, 32)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images_of_any_size(height: int, width: int) -> None:
    with torch.no_grad():
        image = torch.randn(2, 3, height, width)
        assert ConvEncoder((3, height, width), 7, 2, 8)(image).shape == (2, 7)
        decoder = ConvDecoder([(1, 5, 4), (6,)], (3, height, width), 2, 8)
        out = decoder(torch.randn(2, 1, 5, 4), torch.randn(4, 2, 6))
        assert out.shape == (4, 2, 3, height, width)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_pixel_counts(height: int, width: int) -> None:
    image = torch.randn(1, 1, height, width, requires_grad=True)
    ConvEncoder((1, height, width), 3, 4, 16)(image).sum().backward()
    assert image.grad is not None
    assert image.grad.ne(0).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_output_pixel_is_learned(height: int, width: int) -> None:
    decoder = ConvDecoder([(3,)], (1, height, width), 2, 8)
    z = torch.randn(1, 3, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda v: decoder(v).flatten(), z)
    assert jacobian.ne(0).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [14, 17])
def test_a_low_resolution_pixel_reaches_its_own_place(size: int) -> None:
    half = -(-size // 2)
    decoder = ConvDecoder([(1, half, half)], (1, size, size), 2, 8)
    with torch.no_grad():
        # Without the trunk the image reaches the output by the second convolution alone.
        for parameter in [*decoder.trunk.parameters(), *decoder.first.parameters()]:
            parameter.zero_()
        low = torch.zeros(1, 1, half, half)
        low[0, 0, 3, 4] = 1.0
        moved = (decoder(low) - decoder(torch.zeros_like(low)))[0, 0].ne(0).nonzero()
    # A transposed convolution of width 4 and stride 2, padded by one, spreads a pixel over rows 2i − 1 … 2i + 2.
    assert {tuple(place) for place in moved.tolist()} == {(r, c) for r in range(5, 9) for c in range(7, 11)}
