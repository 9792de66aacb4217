# SPDX-License-Identifier: Apache-2.0
# Warnings, hardening and sanitizers that every target of this tree is built with.
add_compile_options(
  -Wall -Wextra -Wshadow -Wcast-align -Wformat=2 -Werror
  $<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor>
  $<$<COMPILE_LANGUAGE:CXX>:-Woverloaded-virtual>
  # Designated initialisers leave the rest zero on purpose.
  -Wno-missing-field-initializers)

if(CLONE_SANITIZE)
  add_compile_options(-fsanitize=${CLONE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${CLONE_SANITIZE})
else()
  add_compile_options(-fstack-protector-strong $<$<NOT:$<CONFIG:Debug>>:-D_FORTIFY_SOURCE=2>)
endif()
add_link_options(-Wl,-z,relro,-z,now -Wl,--gc-sections)
add_compile_options(-ffunction-sections -fdata-sections)

# Developer conveniences, used when the machine has them.
find_program(CLONE_CCACHE ccache)
if(CLONE_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CLONE_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${CLONE_CCACHE})
endif()
find_program(CLONE_MOLD mold)
if(CLONE_MOLD)
  add_link_options(-fuse-ld=mold)
endif()
