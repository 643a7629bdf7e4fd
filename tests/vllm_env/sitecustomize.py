"""For the vLLM test environment alone, on PYTHONPATH so that vLLM's child processes run it as well.

The registry's torchvision is built for CUDA. On a CPU its Python layer works once two operators are declared before
it is imported; none of the code under test calls them.
"""

import importlib.util

if importlib.util.find_spec("torchvision") is not None:
    import torch

    KEEP = torch.library.Library("torchvision", "FRAGMENT")  # the declarations end with this object
    for _signature in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        KEEP.define(_signature)
