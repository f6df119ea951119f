"""What may denoise in the place of the plain UNet, and the worker that finishes a batch beside the next one."""
