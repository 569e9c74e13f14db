"""Tiny pipelines of every class that the diffusers editor knows, besides InstructPix2Pix: see tests/tiny_model.py.

Each is made of the class's own components (text encoder, tokenizer, transformer, VAE, scheduler), with random weights
and vocabularies of single letters, and saved by `save_pretrained`.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tiny_model import _text_model, _tokenizer, _unet, _vae

_SPECIAL: Final = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_CHAT: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MISTRAL_CHAT: Final = (
    "<s>{% for message in messages %}[INST]{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/INST]"
    "{% endfor %}"
)


def build(name: str, folder: Path, **fields: Any) -> Path:
    """Save a tiny pipeline of a class; returns its folder."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        torch.manual_seed(0)
        parts = _PARTS[name](folder)
        pipeline = getattr(diffusers, name)(**parts, **fields)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                _enliven(part)
        if hasattr(pipeline, "transformer"):
            _enlarge(pipeline.transformer, 8, "attn")
        elif name.startswith("DreamLite"):
            _enlarge(pipeline.unet, 1.5)
            _enlarge(pipeline.vae, 1.7)
        pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def build_lora(name: str, model: Path, folder: Path, *, seed: int = 1) -> Path:
    """Save a LoRA for the denoiser of a saved pipeline of a class, made by peft, as training scripts do; its file."""
    import diffusers
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, name)
        pipeline = kind.from_pretrained(str(model), local_files_only=True)
        part = "unet" if hasattr(pipeline, "unet") else "transformer"
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        getattr(pipeline, part).add_adapter(config)
        layers = peft.get_peft_model_state_dict(getattr(pipeline, part))
        kind.save_lora_weights(folder, **{f"{part}_lora_layers": layers})
    return folder / "pytorch_lora_weights.safetensors"


def _enliven(model: torch.nn.Module) -> None:
    """Replace parameters that are all zero or not set, as some layers begin, so that every input has an effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any() or parameter.abs().max() > 1e4:
                parameter.normal_(0, 0.05)


def _enlarge(model: torch.nn.Module, factor: float, names: str = "") -> None:
    """Enlarge weights, so that what few small layers hand on from one image to another can be seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name and parameter.ndim > 1:
                parameter.mul_(factor)


# Flow matching with transformers -------------------------------------------------------------------------------------


def _flux2_klein(folder: Path) -> dict[str, Any]:
    import transformers

    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen3Config(**_QWEN, vocab_size=len(tokenizer), num_hidden_layers=28, head_dim=8)
    return {**_flux2(16 * 3), "tokenizer": tokenizer, "text_encoder": transformers.Qwen3ForCausalLM(config)}


def _flux2_dev(folder: Path) -> dict[str, Any]:
    import transformers

    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(special), pad_token="</s>", bos_token="<s>", eos_token="</s>"
    )
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=16),
        tokenizer,
        chat_template=_MISTRAL_CHAT,
    )
    text = transformers.MistralConfig(**_QWEN, vocab_size=len(tokenizer), num_hidden_layers=30, head_dim=8)
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("[IMG]")
    )
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    return {**_flux2(16 * 3, guided=True), "tokenizer": processor, "text_encoder": encoder}


def _flux2(text: int, *, guided: bool = False) -> dict[str, Any]:
    import diffusers

    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=text,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guided,
        ),
        "vae": diffusers.AutoencoderKLFlux2(**_VAE, latent_channels=4, sample_size=32),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _flux_kontext(folder: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    clip = _tokenizer(folder / "words")
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,-"]
    t5 = transformers.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0, additional_special_tokens=[]
    )
    config = transformers.T5Config(
        vocab_size=len(t5), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "tokenizer": clip,
        "tokenizer_2": t5,
        "text_encoder": _text_model(transformers, len(clip), 32, 2, 64),
        "text_encoder_2": transformers.T5EncoderModel(config),
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": diffusers.AutoencoderKL(
            **_VAE, latent_channels=4, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def _qwen_image_edit(folder: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    tokenizer = _qwen_tokenizer()
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=_PIXELS), tokenizer, transformers.Qwen2VLVideoProcessor()
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_QWEN,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 1,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        **_vision_ids(tokenizer),
    )
    return {
        "tokenizer": tokenizer,
        "processor": processor,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "transformer": diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


def _z_image(folder: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    tokenizer = _qwen_tokenizer()
    config = transformers.Qwen3Config(**_QWEN, vocab_size=len(tokenizer), num_hidden_layers=2, head_dim=8)
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Qwen3Model(config),
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[1024, 128, 128],
        ),
        "vae": diffusers.AutoencoderKL(**_VAE, latent_channels=4, shift_factor=0.1, scaling_factor=0.4),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _sana_sprint(folder: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(code) for code in range(33, 127)]
    words += [word for word in ("▁", *letters) if word not in words]
    tokenizer = transformers.GemmaTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    config = transformers.Gemma2Config(**_QWEN, vocab_size=len(tokenizer), num_hidden_layers=1, head_dim=8)
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.Gemma2Model(config),
        "transformer": diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        "vae": diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
            decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 5 + ((5,),),
            decoder_qkv_multiscales=((),) * 5 + ((5,),),
        ),
        "scheduler": diffusers.SCMScheduler(),
    }


def _dream_lite(folder: Path) -> dict[str, Any]:
    import diffusers
    import transformers

    tokenizer = _qwen_tokenizer()
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(size=_PIXELS, patch_size=16), tokenizer, transformers.Qwen3VLVideoProcessor()
    )
    config = transformers.Qwen3VLConfig(
        text_config={
            **_QWEN,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 1,
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        **_vision_ids(tokenizer),
    )
    return {
        "tokenizer": tokenizer,
        "processor": processor,
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(config),
        "unet": diffusers.DreamLiteUNetModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=2,
            use_linear_projection=True,
            addition_embed_type="text_time" if False else None,
        ),
        "vae": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


# Stable Diffusion ----------------------------------------------------------------------------------------------------


def _stable_diffusion(folder: Path) -> dict[str, Any]:
    parts = _stable_diffusion_parts(folder, sdxl=False)
    return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _stable_diffusion_xl(folder: Path) -> dict[str, Any]:
    import transformers

    parts = _stable_diffusion_parts(folder, sdxl=True)
    config = transformers.CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), "projection_dim": 32})
    second = transformers.CLIPTextModelWithProjection(config)
    return {**parts, "text_encoder_2": second, "tokenizer_2": parts["tokenizer"]}


def _stable_diffusion_parts(folder: Path, *, sdxl: bool) -> dict[str, Any]:
    import diffusers
    import transformers

    tokenizer = _tokenizer(folder / "words")
    return {
        "vae": _vae(diffusers, (32, 64), 1),
        "text_encoder": _text_model(transformers, len(tokenizer), 32, 2, 64),
        "tokenizer": tokenizer,
        "unet": _unet(diffusers, (32, 64), 32, sdxl=sdxl, images=0),
        "scheduler": diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
    }


# Parts ---------------------------------------------------------------------------------------------------------------

_QWEN: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
_VAE: Final[dict[str, Any]] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_PIXELS: Final = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}


def _byte_tokenizer(special: tuple[str, ...]) -> Any:
    import tokenizers

    words = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    model = tokenizers.models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _qwen_tokenizer() -> Any:
    """Qwen's tokenizer of single bytes."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: place for place, word in enumerate([*_SPECIAL, *letters])},
        merges=[],
        additional_special_tokens=list(_SPECIAL[1:]),
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


_PARTS: Final[Mapping[str, Callable[[Path], dict[str, Any]]]] = {
    "Flux2KleinPipeline": _flux2_klein,
    "Flux2KleinKVPipeline": _flux2_klein,
    "Flux2Pipeline": _flux2_dev,
    "FluxKontextPipeline": _flux_kontext,
    "QwenImageEditPipeline": _qwen_image_edit,
    "QwenImageEditPlusPipeline": _qwen_image_edit,
    "DreamLitePipeline": _dream_lite,
    "DreamLiteMobilePipeline": _dream_lite,
    "ZImageImg2ImgPipeline": _z_image,
    "ZImagePipeline": _z_image,
    "SanaSprintImg2ImgPipeline": _sana_sprint,
    "StableDiffusionImg2ImgPipeline": _stable_diffusion,
    "StableDiffusionXLImg2ImgPipeline": _stable_diffusion_xl,
}
