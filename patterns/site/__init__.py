"""What the parts of a site are read as: operands, masks, frames, and the node put together."""
