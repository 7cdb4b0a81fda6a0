"""An IP-Adapter file and its pictures, as somebody without this project makes them: stock diffusers alone."""

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file


def load(pipe, path):
    """Put an adapter's file into a stock pipeline; tiny models have no image encoder to go with it."""
    pipe.load_ip_adapter(
        str(path.parent),
        subfolder="",
        weight_name=path.name,
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )


def make(pipeline, out, *, image_width, prompts, seeds, steps, guidance_scale, scale, seed=0):
    """Write random weights in the published layout to ``out``; return embeds and the pictures they draw.

    Embeds are (2,1,image_width), the zero image first; pictures (B,H,W,3) float32 in [0,1].
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    pipe = DiffusionPipeline.from_pretrained(pipeline, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    width = pipe.unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": draw(4 * width, image_width),
        "image_proj.proj.bias": draw(4 * width),
        "image_proj.norm.weight": 1 + draw(width),
        "image_proj.norm.bias": draw(width),
    }
    modules = dict(pipe.unet.named_modules())
    for number, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            out_width = modules[name.removesuffix(".processor")].to_k.out_features
            tensors[f"ip_adapter.{number}.to_k_ip.weight"] = draw(out_width, width)
            tensors[f"ip_adapter.{number}.to_v_ip.weight"] = draw(out_width, width)
    save_file(tensors, out)
    load(pipe, out)
    pipe.set_ip_adapter_scale(scale)
    embeds = torch.cat([torch.zeros(1, 1, image_width), draw(1, 1, image_width) / 0.3])
    pictures = pipe(
        prompts,
        ip_adapter_image_embeds=[embeds],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    return embeds, torch.from_numpy(pictures)
