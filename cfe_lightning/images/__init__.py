"""Images as files and as tensors: float32, [C, H, W] or [B, C, H, W], in [-1, 1], with one channel or RGB."""

# isort: off
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.images.drawing import amplify, arrows, draw_motion, grid, heat_map, signed_difference
from cfe_lightning.images.pixels import (
    cut_montage, montage_side, resize, saved, tile_montage, to_pil, to_uint8, to_unit, visible_change,
)  # fmt: skip
from cfe_lightning.images.reading import (
    EXTENSIONS, MAX_PIXELS, UnreadableImageError, find_images, from_pil, is_picture, read_image,
)  # fmt: skip
from cfe_lightning.images.saving import can_save_video, pixel_digest, read_saved, save_animation, save_image

__all__ = [
    "EXTENSIONS", "MAX_PIXELS", "UnreadableImageError", "amplify", "arrows", "can_save_video", "cut_montage",
    "draw_motion", "find_images", "from_pil", "grid", "heat_map", "is_picture", "montage_side", "pictures_at_once",
    "pixel_digest", "read_image", "read_saved", "resize", "save_animation", "save_image", "saved", "signed_difference",
    "tile_montage", "to_pil", "to_uint8", "to_unit", "visible_change",
]  # fmt: skip
