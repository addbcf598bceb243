"""Export a torchvision classifier to ONNX and write its explanation into it: NAME -> OUT.onnx, OUT.explained.onnx.

    pip install -r scripts/requirements-networks.txt -e .
    python scripts/export_torchvision.py resnet50 -o resnet50 --exporter torchscript

Weights are drawn, unless --checkpoint names a state dict.
"""

import torch_export
from vision_networks import from_torchvision

if __name__ == "__main__":
    torch_export.main("torchvision", from_torchvision)
