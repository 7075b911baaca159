"""What is measured: identity similarity (My3DGen equation 2), perceptual distances, SSIM, PSNR."""

from convlora.integrations.eg3d.metrics.bootstrap import bootstrap as bootstrap
from convlora.integrations.eg3d.metrics.bootstrap import paired_difference as paired_difference
from convlora.integrations.eg3d.metrics.diversity import diversity as diversity
from convlora.integrations.eg3d.metrics.identity import IdentityEncoder as IdentityEncoder
from convlora.integrations.eg3d.metrics.identity import id_sim as id_sim
from convlora.integrations.eg3d.metrics.identity import identity_consistency as identity_consistency
from convlora.integrations.eg3d.metrics.image import psnr as psnr
from convlora.integrations.eg3d.metrics.loading import described as described
from convlora.integrations.eg3d.metrics.loading import load_identity as load_identity
from convlora.integrations.eg3d.metrics.loading import load_perceptual as load_perceptual
from convlora.integrations.eg3d.metrics.ssim import ssim as ssim
