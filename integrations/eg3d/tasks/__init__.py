"""What one does with a personal generator; each task works alike on pretrained, fully tuned and adapted ones."""

from convlora.integrations.eg3d.tasks.background import replace_background as replace_background
from convlora.integrations.eg3d.tasks.edit import edit as edit
from convlora.integrations.eg3d.tasks.edit import edit_alpha as edit_alpha
from convlora.integrations.eg3d.tasks.edit import personal_direction as personal_direction
from convlora.integrations.eg3d.tasks.hull import Hull as Hull
from convlora.integrations.eg3d.tasks.hull import make_hull as make_hull
from convlora.integrations.eg3d.tasks.inpaint import inpaint as inpaint
from convlora.integrations.eg3d.tasks.interpolate import interpolate as interpolate
from convlora.integrations.eg3d.tasks.invert import invert as invert
from convlora.integrations.eg3d.tasks.mesh import mesh as mesh
from convlora.integrations.eg3d.tasks.project import project as project
from convlora.integrations.eg3d.tasks.synthesize import synthesize as synthesize
from convlora.integrations.eg3d.tasks.upscale import upscale as upscale
from convlora.integrations.eg3d.tasks.views import novel_views as novel_views
