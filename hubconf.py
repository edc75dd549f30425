"""For torch.hub: the registered sizes as entry points, which take the arguments of `DynamicViT`.

torch.hub.load("USER/REPOSITORY", "dynamic_vit_small_patch16_224", cls_pos=6, reg_pos=3)
"""

from timm.models import model_entrypoint as _entry_point

from models_dynamic import SIZES as _SIZES

dependencies = ["torch", "timm"]

globals().update({name: _entry_point(name) for name in _SIZES})
