# SPDX-License-Identifier: Apache-2.0
# clone_plugin(NAME SOURCES... [LIBRARIES ...]): one plugin, NAME.so, built and installed where `clone` looks.
# Installed with the package too: a third party's plugin is built by the same function.
set(CLONE_PLUGIN_CMAKE_DIR ${CMAKE_CURRENT_LIST_DIR})
function(clone_plugin name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_library(${name} MODULE ${arg_SOURCES} ${arg_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE clone::plugin-sdk ${arg_LIBRARIES})
  set_target_properties(${name} PROPERTIES PREFIX "" C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  if(CLONE_PLUGIN_OUTPUT_DIR)
    set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CLONE_PLUGIN_OUTPUT_DIR})
  endif()
  # One exported symbol; anything unresolved is an error now, not when the plugin is loaded.
  target_link_options(${name} PRIVATE -Wl,--version-script=${CLONE_PLUGIN_CMAKE_DIR}/plugin.map)
  # Its own copy of the C++ runtime, of which it uses little: no other version can come between, nothing is shared but C.
  if(NOT CLONE_SANITIZE)
    target_link_options(${name} PRIVATE -Wl,--no-undefined -static-libstdc++)
  endif()
  set_property(GLOBAL APPEND PROPERTY CLONE_PLUGINS ${name})
  install(TARGETS ${name} LIBRARY DESTINATION lib/clone/plugins)
endfunction()
