"""What is measured: identity similarity (My3DGen equation 2), PSNR."""

from convlora.integrations.eg3d.metrics.identity import IdentityEncoder as IdentityEncoder
from convlora.integrations.eg3d.metrics.identity import id_sim as id_sim
from convlora.integrations.eg3d.metrics.image import psnr as psnr
