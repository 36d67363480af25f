# SPDX-License-Identifier: MIT
"""The models of a configuration: sizes, initialization, options, conditions, sampling."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.training import AdvancedUNet, DiffusionConfig, DiffusionModel

SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 2,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_heads": 4,
    "dropout": 0.0,
    "num_timesteps": 100,
}
CROSS: dict[str, Any] = {**SMALL, "use_spatial_transformer": True, "context_dim": 16}


def config(**fields: Any) -> DiffusionConfig:
    return DiffusionConfig(**{**SMALL, **fields})


def quiet(fields: dict[str, Any]) -> AdvancedUNet:
    """Make a U-Net of sizes that the guide calls unusual."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AdvancedUNet(DiffusionConfig(**fields)).eval()


@pytest.fixture(scope="module")
def conditional() -> AdvancedUNet:
    return quiet(CROSS)


def test_unet_has_the_sizes_of_the_configuration() -> None:
    with torch.device("meta"):
        plain = AdvancedUNet(DiffusionConfig(num_layers=3, hidden_size=64, num_heads=8, num_res_blocks=3))
        cross = AdvancedUNet(
            DiffusionConfig(channel_mult=(1, 2, 4), use_spatial_transformer=True, transformer_depth=2, dropout=0.2)
        )
    assert type(plain.unet).__name__ == "UNet2DModel"
    assert plain.unet.config.block_out_channels == (64, 128, 128)
    assert [type(block).__name__ for block in plain.unet.down_blocks] == [
        "DownBlock2D",
        "DownBlock2D",
        "AttnDownBlock2D",
    ]
    assert [len(block.resnets) for block in plain.unet.down_blocks] == [3, 3, 3]
    assert {one.heads for one in plain.modules() if type(one).__name__ == "Attention"} == {8}
    assert {one.num_groups for one in plain.modules() if isinstance(one, nn.GroupNorm)} == {16}  # 64 channels
    assert type(cross.unet).__name__ == "UNet2DConditionModel"
    assert [hasattr(block, "attentions") for block in cross.unet.down_blocks] == [False, False, True]  # 16 pixels
    assert [hasattr(block, "attentions") for block in cross.unet.up_blocks] == [True, False, False]
    blocks = cross.unet.down_blocks[2].attentions[0].transformer_blocks
    assert len(blocks) == 2
    assert (blocks[0].attn2.heads, blocks[0].attn2.to_k.in_features) == (8, 768)
    assert {one.p for one in cross.unet.down_blocks.modules() if isinstance(one, nn.Dropout)} >= {0.2}


@torch.no_grad()
def test_weights_are_initialized_by_kind(conditional: AdvancedUNet) -> None:
    def check() -> None:
        for module in conditional.modules():
            if isinstance(module, nn.Linear):
                bound = math.sqrt(6 / (module.in_features + module.out_features))
                assert float(module.weight.abs().max()) <= bound
                # A uniform variable's deviation is its bound/√3; 1000 numbers or more estimate it within 10 %.
                assert float(module.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
            elif isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * math.prod(module.kernel_size)
                assert float(module.weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.15)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                assert bool((module.weight == 1).all())
            else:
                continue
            assert module.bias is None or not bool(module.bias.any())

    check()
    for parameter in conditional.parameters():
        parameter.fill_(7.0)
    conditional._init_weights()
    check()


@torch.no_grad()
def test_conditions(conditional: AdvancedUNet) -> None:
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 50])
    text = torch.randn(2, 5, 16)
    found = conditional(x, t, text)["sample"]
    assert found.shape == x.shape
    nothing = conditional(x, t)["sample"]
    # The null condition: keys and values of zeros are the same for any number of tokens.
    torch.testing.assert_close(conditional(x, t, torch.zeros(2, 7, 16))["sample"], nothing)
    assert not torch.allclose(found, nothing)
    alone = conditional(x[:1], 3, text[:1])["sample"]
    torch.testing.assert_close(alone, found[:1], rtol=1e-4, atol=1e-5)  # other kernels for another batch size
    for given, message in (
        ((x[:, :1], t), "AdvancedUNet: sample has shape"),
        ((x[..., :7], t), "multiples of 2"),
        ((x.long(), t), "sample has dtype torch.int64"),
        ((x, t, text[..., :3]), r"encoder_hidden_states has shape \[2, 5, 3\], expected \[2, tokens, 16\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            conditional(*given)
    with pytest.raises(ValueError, match="this U-Net has no cross-attention"):
        AdvancedUNet(config())(x, t, text)


def test_checkpointing_recomputes_and_changes_no_gradient() -> None:
    plain, checkpointed = AdvancedUNet(config()), AdvancedUNet(config(gradient_checkpointing=True))
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 8, 8)
    stored, gradients = [], []
    for model in (plain, checkpointed):
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = (model(x, 7)["sample"] ** 2).mean()
        stored.append(sum(sizes))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert stored[1] < stored[0] / 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # sums in another order


def test_attention_options(conditional: AdvancedUNet) -> None:
    sliced = quiet({**CROSS, "use_attention_slicing": True})
    efficient = quiet({**CROSS, "use_attention_slicing": True, "use_memory_efficient_attention": True})
    kinds = [{type(one).__name__ for one in model.unet.attn_processors.values()} for model in (sliced, efficient)]
    assert kinds == [{"SlicedAttnProcessor"}, {"AttnProcessor2_0"}]
    sliced.load_state_dict(conditional.state_dict())
    x, text = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 16)
    with torch.no_grad():
        found, expected = (model(x, 1, text)["sample"] for model in (sliced, conditional))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the same sums in another order
    plain = AdvancedUNet(config(use_memory_efficient_attention=True))  # the remedy of the next error
    kinds = [{type(one.processor).__name__ for one in plain.modules() if hasattr(one, "processor")}]
    assert kinds == [{"AttnProcessor2_0"}]
    with pytest.raises(ValueError, match="use_attention_slicing is set for a UNet2DModel, which has no"):
        AdvancedUNet(config(use_attention_slicing=True))


def test_missing_xformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("diffusers.models.attention", "diffusers.models.attention_processor"):
        monkeypatch.setattr(f"{module}.is_xformers_available", lambda: False)
    with pytest.raises(ImportError, match=r"AdvancedUNet: use_xformers is refused by diffusers .*; install xformers"):
        AdvancedUNet(config(use_xformers=True))


class Linear(nn.Module):
    """A model whose output is linear in the sample and the condition; twice the channels where it learns a variance."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        shift = 0.0 if text is None else text.mean((1, 2)).reshape(-1, 1, 1, 1)
        output = self.scale * x + shift
        return {"sample": torch.cat([output, torch.full_like(output, 0.3)], 1) if self.learned else output}


def test_guidance_applies_to_conditions() -> None:
    model = DiffusionModel(config(), Linear())
    text = torch.randn(3, 2, 5, dtype=torch.float64)
    found = model.sample(3, 1, guidance_scale=4.0, prompt_embeds=text, seeds=[1, 2, 3], progress=False)

    def output(condition: Tensor | None) -> Tensor:
        predicted: Tensor = model.unet(x, None, condition)["sample"]
        return predicted

    x = model.sample(3, 1, seeds=[1, 2, 3], progress=False)  # linear in the latents: they follow from the result
    bar = float(model.scheduler.alphas_cumprod[0])
    x = x * math.sqrt(bar) / (1 - math.sqrt(1 - bar) * 0.4)
    guided = output(None) + 4.0 * (output(text) - output(None))
    expected = (x - math.sqrt(1 - bar) * guided) / math.sqrt(bar)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_ddim", [True, False])
def test_learned_variance_is_sampled(use_ddim: bool) -> None:
    learned = DiffusionModel(config(out_channels=4), Linear(learned=True))
    fixed = DiffusionModel(config(), Linear())
    options: dict[str, Any] = {"num_inference_steps": 5, "use_ddim": use_ddim, "seeds": [4, 5], "progress": False}
    found, other = learned.sample(2, **options), fixed.sample(2, **options)
    assert found.shape == (2, 2, 8, 8)
    assert torch.equal(found, other) == use_ddim  # DDIM uses no variance, DDPM the model's
    method = "ddim" if use_ddim else "ddpm"
    options["use_ddim"] = None
    own = DiffusionModel(config(out_channels=4, sampling_method=method), Linear(learned=True))
    assert torch.equal(own.sample(2, **options), found)


def test_sampling_repeats_and_restores_the_mode() -> None:
    model = DiffusionModel(config(dropout=0.5, eta=1.0))
    assert model.training
    options: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    first = model.sample(2, seeds=[8, 9], **options)
    assert model.training
    assert model.unet.training
    assert not first.requires_grad
    torch.testing.assert_close(model.sample(1, seeds=[9], **options), first[1:], rtol=1e-3, atol=1e-4)
    one, two = (model.sample(2, generator=torch.Generator().manual_seed(3), **options) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, first)
    assert model.sample(1, method="dpm_solver", **options).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"DiffusionModel.sample: batch_size is 0"):
        model.sample(0)
