"""Many runs compared: a grid of losses, settings, seeds and data conditions."""
