# SPDX-License-Identifier: MIT
"""Server of handwritten digits: one picture a request, the same one for the same request.

Run it with ``python examples/serve_fastapi.py --port 8000`` and ask for ``/digits/7?seed=3&method=ddim&steps=20``.
Needs fastapi and uvicorn.
"""

from __future__ import annotations

import argparse
import io

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from PIL import Image

import fastdiff
from fastdiff.digits import IMAGE_SHAPE, NULL_CLASS, load_digit_unet

app = FastAPI(title="digits")
model = load_digit_unet()


@app.get("/digits/{digit}")
def draw(
    digit: int, seed: int = 0, method: str = "dpm_solver", steps: int = 20, guidance_scale: float = 3.0
) -> Response:
    """Draw one digit as a PNG; FastAPI calls this in a thread of its own for each request."""
    try:
        manager = fastdiff.create_advanced_sampling_manager(
            schedule_type="cosine",
            method=method,
            prediction_type="v_prediction",
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        seeds = fastdiff.spawn_seeds(seed, 1)
        result = manager.sample(
            model,
            fastdiff.randn((1, *IMAGE_SHAPE), seeds),
            torch.tensor([digit]),
            torch.tensor([NULL_CLASS]),
            seeds=seeds,
            progress=False,
        )
    except (TypeError, ValueError) as error:  # the library names the argument, what it expected and the remedy
        raise HTTPException(status_code=422, detail=str(error)) from error
    return Response(png(result.samples[0, 0]), media_type="image/png")


def png(image: torch.Tensor, scale: int = 16) -> bytes:
    """Encode a grey image ``[H, W]`` in [−1, 1]."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    height, width = pixels.shape
    picture = Image.frombytes("L", (width, height), bytes(pixels.flatten().tolist()))
    file = io.BytesIO()
    picture.resize((width * scale, height * scale), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
