"""The layers of the method and the denoiser; they need torch alone."""
