"""Networks: backbones, and the hosts that LPCAM is plugged into."""
