"""What MeshServe costs and gives, measured."""
