"""InstructPix2Pix pipelines out of configs: tiny ones for tests, the published one's size for timing on a GPU.

No weights can be fetched where the tests run. These are real pipelines of diffusers' own classes, saved by
`save_pretrained`, with random weights: their edits are no pictures, but every step from prompt to pixels is taken.
"""

import json
import string
import warnings
from pathlib import Path
from typing import Any

import torch


def build_instruct_pix2pix(folder: Path, *, sdxl: bool = False) -> Path:
    """Save a tiny one; about 8 MB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        return _build(folder, sdxl=sdxl)


def _build(folder: Path, *, sdxl: bool) -> Path:
    import diffusers
    import transformers

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "words")
    text = _text_model(transformers, len(tokenizer), 32, 2, 64)
    parts: dict[str, Any] = {
        "vae": _vae(diffusers, (32, 64), 1),
        "text_encoder": text,
        "tokenizer": tokenizer,
        "unet": _unet(diffusers, (32, 64), 32, sdxl=sdxl),
        "scheduler": diffusers.EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
    }
    if sdxl:
        config = transformers.CLIPTextConfig(**{**text.config.to_dict(), "projection_dim": 32})
        second = transformers.CLIPTextModelWithProjection(config)
        pipeline = diffusers.StableDiffusionXLInstructPix2PixPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer
        )
    else:
        pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def build_full_size(folder: Path) -> Path:
    """Save one of the architecture of timbrooks/instruct-pix2pix (Stable Diffusion 1.5), weights random: 4 GB."""
    import diffusers
    import transformers

    tokenizer = _tokenizer(folder / "words")
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=_vae(diffusers, (128, 256, 512, 512), 2),
        text_encoder=_text_model(transformers, 49408, 768, 12, 3072, heads=12),
        tokenizer=tokenizer,
        unet=full_size_unet(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def full_size_unet() -> Any:
    """The UNet of Stable Diffusion 1.5 with the four more input channels of InstructPix2Pix."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def _tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer of single letters, in its two files."""
    from transformers import CLIPTokenizer

    letters = string.ascii_letters + string.digits + string.punctuation
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na n</w>\n")
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate([*words, "an</w>"])}))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _text_model(transformers: Any, words: int, size: int, layers: int, inner: int, heads: int = 4) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=size,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=words - 3,
        eos_token_id=words - 2,
        pad_token_id=words - 2,
    )
    return transformers.CLIPTextModel(config)


def _vae(diffusers: Any, channels: tuple[int, ...], layers: int) -> Any:
    # Eight pixels a latent, as every Stable Diffusion has it, whatever the number of channels.
    channels = channels if len(channels) == 4 else (channels[0], channels[0], channels[1], channels[1])
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=layers,
        norm_num_groups=16,
    )


def _unet(diffusers: Any, channels: tuple[int, ...], text: int, *, sdxl: bool, images: int = 1) -> Any:
    """Takes the latents of the edit, and of so many images besides."""
    more: dict[str, Any] = {}
    if sdxl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 32,
        }
        text *= 2
    return diffusers.UNet2DConditionModel(
        sample_size=32,
        in_channels=4 + 4 * images,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )
