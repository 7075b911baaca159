"""What one does with a personal generator; each task works alike on pretrained, fully tuned and adapted ones."""

from convlora.integrations.eg3d.tasks.interpolate import interpolate as interpolate
from convlora.integrations.eg3d.tasks.views import novel_views as novel_views
