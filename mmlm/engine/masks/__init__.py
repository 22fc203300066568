"""Who may attend to whom: rules, kinds of layers, and what each kernel can be told."""
