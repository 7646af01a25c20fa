"""A pipeline of diffusers whose transformer runs attncc's kernels, block by block.

    python examples/diffusion.py

`compile_repeated_blocks` compiles one block for all of them. It asks for Inductor, so attncc is installed there.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import attncc

torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
).eval()  # fmt: skip
vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, latent_channels=4).eval()
pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)


def picture() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline([1], generator=g, num_inference_steps=2, output_type="np").images)


wanted = picture()
transformer._repeated_blocks = ["BasicTransformerBlock"]  # diffusers' larger models name theirs
with attncc.install_in_inductor(), attncc.record() as report:
    transformer.compile_repeated_blocks()
    found = picture()
print(report)
print("largest difference to eager:", (found - wanted).abs().max().item())
