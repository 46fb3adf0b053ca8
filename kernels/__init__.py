"""Kernels: tensors in, tensors out. Partition, selection and attention behind the ``vmoba`` operators."""

# In a program started from the clone's root, diffusers and transformers find this folder when they look for a package
# `kernels` of the Hugging Face hub. Importing it must then do nothing: the operators would be registered a second time,
# which breaks the first registration.
if __name__ == "vmoba_compile.kernels":
    from .api import Selection, attention, select
    from .partition import Geometry

__all__ = ["Geometry", "Selection", "attention", "select"]
