"""Where the model looks: heat maps, pages, videos, cameras, the demo."""
