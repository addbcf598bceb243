"""Export a timm classifier to ONNX and write its explanation into it: NAME -> OUT.onnx, OUT.explained.onnx.

    pip install -r scripts/requirements-networks.txt -e .
    python scripts/export_timm.py vit_small_patch16_224 -o vit

Weights are drawn, unless --checkpoint names a state dict.
"""

import torch_export
from vision_networks import from_timm

if __name__ == "__main__":
    torch_export.main("timm", from_timm)
