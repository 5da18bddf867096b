from diffgan_fast.cli import main

main()
