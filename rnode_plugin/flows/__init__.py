"""The flow for images, and what lies between an image and a flow."""
