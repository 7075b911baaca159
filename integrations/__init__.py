"""Model families convlora knows by name: StyleGAN2 and EG3D generators written from their equations."""
