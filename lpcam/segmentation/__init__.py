"""From masks to a network that labels every pixel of pictures without labels."""
